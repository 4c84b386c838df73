"""Open the images that --data and --val-data name, as a training and a validation set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitcompress.bundled import Bundle
from vitcompress.data.crops import open_crops
from vitcompress.data.folders import folder_at, open_folder
from vitcompress.data.named import open_named
from vitcompress.data.readers import ArrayReader
from vitcompress.data.sets import ImageSet, RawImageSet, hold_out, label_images
from vitcompress.data.shards import open_shards
from vitcompress.data.tables import open_table
from vitcompress.errors import DataError, Faults
from vitcompress.recipe import BUILT_IN, DataRecipe

_PATTERN = re.compile(r"[{}*?\[\]]|:")  # a pattern of shards, or a URL
_KIND = re.compile(r"(wds|hfds|torch)([:/])(.+)", re.IGNORECASE | re.DOTALL)


def open_sets(
    recipe: DataRecipe, *, bundle: Bundle | None, num_classes: int | None, seed: int, classes: Sequence[str] = (),
    flag: str = "--data",
) -> tuple[ImageSet | None, ImageSet | None]:  # fmt: skip
    """Open the images to train and to evaluate on; decodes no image.

    Args:
        recipe: names of the images, and the class map.
        bundle: built-in model whose images are the default.
        num_classes: number K of the model's classes; 0 if it has no classes, so that labels are
            left out; None to take the number from the training images.
        seed: decides which images are held out, if there are no validation images.
        classes: names of the model's classes, in order; empty if unknown.
        flag: the flag that named the training images, for messages.

    Returns:
        Training and validation images; each None if not named.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    data = BUILT_IN if recipe.data is None and bundle else recipe.data
    train = open_images(data, "train", flag, recipe, bundle, num_classes, classes) if data else None
    if num_classes is None and train is not None and train.classes:  # both sets have the same classes
        num_classes, classes = len(train.classes), train.classes
    val = None
    if recipe.val_data is not None:
        val = open_to_evaluate(recipe.val_data, "--val-data", recipe, bundle, num_classes, classes)
    elif data is not None:
        val = open_images(data, "val", flag, recipe, bundle, num_classes, classes)
    if val is None and train is not None:
        train, val = hold_out(train, seed=seed)
    return train, val


def check_places(recipe: DataRecipe) -> None:
    """Check that paths of images and of the class map exist; opens and lists nothing.

    Raises:
        DataError: some are missing; all of them at once.
    """
    faults = Faults()
    for flag, spec in (("--data", recipe.data), ("--val-data", recipe.val_data)):
        if spec is not None and spec != BUILT_IN:
            kind, place = kind_of(spec)
            if not kind:
                faults.attempt(folder_at, place, flag)
            elif kind in ("wds", "hfds") and not _PATTERN.search(place) and not Path(place).exists():
                faults.add(f"{flag} {spec} does not exist.")
    if recipe.class_map is not None and not recipe.class_map.is_file():
        faults.add(f"--class-map {recipe.class_map} does not exist.")
    faults.raise_as(DataError)


def open_to_evaluate(
    spec: str, flag: str, recipe: DataRecipe, bundle: Bundle | None, num_classes: int | None,
    classes: Sequence[str] = (),
) -> ImageSet:  # fmt: skip
    """Open the validation images of `spec`, or all its images if it has no validation split.

    The arguments are those of `open_images`.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    val = open_images(spec, "val", flag, recipe, bundle, num_classes, classes)
    images = val or open_images(spec, "train", flag, recipe, bundle, num_classes, classes)
    assert images is not None  # only a validation split may be missing
    return images


def open_images(
    spec: str, split: str, flag: str, recipe: DataRecipe, bundle: Bundle | None, num_classes: int | None,
    classes: Sequence[str] = (),
) -> ImageSet | None:  # fmt: skip
    """Open the images of a split.

    Args:
        spec: name of the images, as --data takes it.
        split: "train" or "val".
        flag: the flag that `spec` was given for, for messages.
        recipe: class map and columns.
        bundle: built-in model whose images `built-in` means.
        num_classes: number K of the model's classes; 0 if it has none; None to count the images'.
        classes: names of the model's classes, in order; empty if unknown.

    Returns:
        The images; None if `split` is "val" and there is no validation split.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    if spec == BUILT_IN:
        return _bundled(bundle, split) if bundle else open_crops(split)
    kind, place = kind_of(spec)
    where = f"{flag} {spec}"
    images: RawImageSet | None
    if kind == "wds":
        images = open_shards(place, split, where, recipe.image_key or "", recipe.label_key or "")
    elif kind == "hfds":
        images = open_table(place, split, where, recipe.image_key or "", recipe.label_key or "")
    elif kind == "torch":
        images = open_named(place, split, where)
    else:
        images = open_folder(place, split, flag)
    if images is None:
        return None
    images = replace(images, name=images.name.removeprefix(f"{flag} "))
    return label_images(images, where, num_classes, recipe.class_map, classes)


def kind_of(spec: str) -> tuple[str, str]:
    """Split `wds:x` into kind and place; a folder has the kind "".

    timm's `wds/x` is understood too, unless there is a path of this name.
    """
    match = _KIND.fullmatch(spec)
    if match is None or (match[2] == "/" and Path(spec).exists()):
        return "", spec
    return match[1].lower(), match[3]


def _bundled(bundle: Bundle, split: str) -> ImageSet:
    with np.load(bundle.images, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    name = f"Fashion-MNIST, {len(images):,} {'training' if split == 'train' else 'test'} images (built in)"
    names = tuple(bundle.pretrained_cfg["label_names"])
    return ImageSet(name, ArrayReader(images, name), tuple(int(y) for y in labels), tuple(range(len(images))), names)
