"""Open what --data and --val-data name: a training and a validation set."""

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
from vitcompress.data.sets import ImageSet, RawImageSet, hold_out, labelled
from vitcompress.data.shards import open_shards
from vitcompress.data.tables import open_table
from vitcompress.errors import DataError, Faults
from vitcompress.recipe import BUILT_IN, DataRecipe

_PATTERN = re.compile(r"[{}*?\[\]]|:")  # of shards, or a URL
_KIND = re.compile(r"(wds|hfds|torch)([:/])(.+)", re.IGNORECASE | re.DOTALL)


def open_sets(
    recipe: DataRecipe, *, bundle: Bundle | None, num_classes: int | None, seed: int, classes: Sequence[str] = (),
    flag: str = "--data",
) -> tuple[ImageSet | None, ImageSet | None]:  # fmt: skip
    """Find the images to train and to evaluate on; opens no image.

    Args:
        recipe: what names them, and the class map.
        bundle: the images of a built-in model, to use where none are named.
        num_classes: K of the model; 0 where it has none and labels mean nothing; None for as many as the training
            images have.
        seed: which images are held out, where they must be.
        classes: names of the model's classes, in order; empty where they are not known.
        flag: the option that named the training images, for messages.

    Returns:
        Training and validation images; None where there are none.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    data = BUILT_IN if recipe.data is None and bundle else recipe.data
    train = open_images(data, "train", flag, recipe, bundle, num_classes, classes) if data else None
    if num_classes is None and train is not None and train.classes:  # so that both sets count the same classes
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
    """Make sure that what names images by a path is there; opens and lists nothing.

    Raises:
        DataError: something is not; every such thing at once.
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
    """The images of `spec` that are set apart to evaluate on; all of them where none are. Arguments of `open_images`.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    apart = open_images(spec, "val", flag, recipe, bundle, num_classes, classes)
    found = apart or open_images(spec, "train", flag, recipe, bundle, num_classes, classes)
    assert found is not None  # only what is set apart may be missing
    return found


def open_images(
    spec: str, split: str, flag: str, recipe: DataRecipe, bundle: Bundle | None, num_classes: int | None,
    classes: Sequence[str] = (),
) -> ImageSet | None:  # fmt: skip
    """The images of a split; None where there are none set apart for it.

    Args:
        spec: what names them, as --data takes it.
        split: "train" or "val".
        flag: the option that it was given for, for messages.
        recipe: class map and columns.
        bundle: the images of a built-in model.
        num_classes: K of the model; 0 where it has none, None for as many as there are.
        classes: names of the model's classes, in order; empty where they are not known.

    Raises:
        DataError: images are missing, or their classes match no mapping.
    """
    if spec == BUILT_IN:
        return _bundled(bundle, split) if bundle else open_crops(split)
    kind, place = kind_of(spec)
    where = f"{flag} {spec}"
    found: RawImageSet | None
    if kind == "wds":
        found = open_shards(place, split, where, recipe.image_key or "", recipe.label_key or "")
    elif kind == "hfds":
        found = open_table(place, split, where, recipe.image_key or "", recipe.label_key or "")
    elif kind == "torch":
        found = open_named(place, split, where)
    else:
        found = open_folder(place, split, flag)
    found = None if found is None else replace(found, name=found.name.removeprefix(f"{flag} "))
    return None if found is None else labelled(found, where, num_classes, recipe.class_map, classes)


def kind_of(spec: str) -> tuple[str, str]:
    """Kind and place of what --data names: `wds:x` and, where no such path is there, timm's `wds/x`; else a folder."""
    found = _KIND.fullmatch(spec)
    if found is None or (found[2] == "/" and Path(spec).exists()):
        return "", spec
    return found[1].lower(), found[3]


def _bundled(bundle: Bundle, split: str) -> ImageSet:
    with np.load(bundle.images, allow_pickle=False) as arrays:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    name = f"Fashion-MNIST, {len(images):,} {'training' if split == 'train' else 'test'} images (built in)"
    names = tuple(bundle.pretrained_cfg["label_names"])
    return ImageSet(name, ArrayReader(images, name), tuple(int(y) for y in labels), tuple(range(len(images))), names)
