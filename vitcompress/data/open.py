"""Open the images that --data and --val-data name, as a training and a validation set."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitcompress.bundled import Bundle
from vitcompress.data.classes import ImageClasses, ModelClasses, Numbering
from vitcompress.data.crops import open_crops
from vitcompress.data.folders import folder_at, open_folder
from vitcompress.data.named import open_named
from vitcompress.data.numbering import number_classes, number_stream
from vitcompress.data.readers import ArrayReader
from vitcompress.data.sets import ImageSet, RawImageSet, hold_out, label_images
from vitcompress.data.shards import open_shards
from vitcompress.data.tables import open_table
from vitcompress.errors import DataError, Faults
from vitcompress.recipe import BUILT_IN, DataRecipe

_PATTERN = re.compile(r"[{}*?\[\]]|:")  # a pattern of shards, or a URL
_KIND = re.compile(r"(wds|hfds|torch)([:/])(.+)", re.IGNORECASE | re.DOTALL)


def open_sets(
    recipe: DataRecipe, *, bundle: Bundle | None, model: ModelClasses, seed: int, flag: str = "--data"
) -> tuple[ImageSet | None, ImageSet | None]:
    """Open the images to train and to evaluate on; decodes no image.

    Both are labeled by one numbering of classes, that of the training images where these have
    labels.

    Args:
        recipe: names of the images, and how their classes are numbered.
        bundle: built-in model whose images are the default.
        model: the model's classes; with 0 of them, labels are left out.
        seed: decides which images are held out, if there are no validation images.
        flag: the flag that named the training images, for messages.

    Returns:
        Training and validation images; each None if not named.

    Raises:
        DataError: images are missing, or their classes match no numbering.
    """
    data = BUILT_IN if recipe.data is None and bundle else recipe.data
    train = _open(data, "train", flag, recipe, bundle) if data else None
    val = None
    if recipe.val_data is not None:
        val = _open_to_evaluate(recipe.val_data, "--val-data", recipe, bundle)
    elif data is not None:
        val = _open(data, "val", flag, recipe, bundle)
    numbering = _number(train, val, model, recipe)
    if model.count is None and numbering is not None:
        model = ModelClasses(numbering.count)
    trained, judged = (label_images(images, numbering, model.count) if images else None for images in (train, val))
    return hold_out(trained, seed=seed) if trained and judged is None else (trained, judged)


def _number(
    train: RawImageSet | None, val: RawImageSet | None, model: ModelClasses, recipe: DataRecipe
) -> Numbering | None:
    """Return the numbering of the classes of both sets; None without labels or classes.

    Raises:
        DataError: labels are no classes, or match no numbering.
    """
    if model.count == 0:
        return None
    given = [images for images in (train, val) if images is not None]
    for fault in filter(None, (images.label_fault for images in given)):
        raise fault
    labeled = [images for images in given if images.has_labels]
    if not labeled:
        return None
    first, *rest = labeled
    if first.classes is None:
        return number_stream(first.name, model, recipe)
    also = [name for images in rest if images.classes for name in images.classes.names]
    return number_classes(first.classes, model, recipe, also)


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


def open_to_evaluate(spec: str, flag: str, recipe: DataRecipe, bundle: Bundle | None, model: ModelClasses) -> ImageSet:
    """Open the validation images of `spec`, or all its images if it has no validation split.

    Args:
        spec: name of the images, as --data takes it.
        flag: the flag that `spec` was given for, for messages.
        recipe: columns, and how classes are numbered.
        bundle: built-in model whose images `built-in` means.
        model: the model's classes; with 0 of them, labels are left out.

    Raises:
        DataError: images are missing, or their classes match no numbering.
    """
    images = _open_to_evaluate(spec, flag, recipe, bundle)
    return label_images(images, _number(images, None, model, recipe), model.count)


def _open_to_evaluate(spec: str, flag: str, recipe: DataRecipe, bundle: Bundle | None) -> RawImageSet:
    images = _open(spec, "val", flag, recipe, bundle) or _open(spec, "train", flag, recipe, bundle)
    assert images is not None  # only a validation split may be missing
    return images


def _open(spec: str, split: str, flag: str, recipe: DataRecipe, bundle: Bundle | None) -> RawImageSet | None:
    """Open the images of a split; None if `split` is "val" and there is no validation split."""
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
    return replace(images, name=images.name.removeprefix(f"{flag} ")) if images else None


def kind_of(spec: str) -> tuple[str, str]:
    """Split `wds:x` into kind and place; a folder has the kind "".

    timm's `wds/x` is understood too, unless there is a path of this name.
    """
    match = _KIND.fullmatch(spec)
    if match is None or (match[2] == "/" and Path(spec).exists()):
        return "", spec
    return match[1].lower(), match[3]


def _bundled(bundle: Bundle, split: str) -> RawImageSet:
    with np.load(bundle.images, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    name = f"Fashion-MNIST, {len(images):,} {'training' if split == 'train' else 'test'} images (built in)"
    names = tuple(bundle.pretrained_cfg["label_names"])
    classes = ImageClasses(names, name, "labels", tuple(range(len(names))), named=True)
    return RawImageSet(name, ArrayReader(images, name), tuple(labels.tolist()), classes)
