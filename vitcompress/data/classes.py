"""Map classes of images to classes of the model: by a file, by name, by number or by order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.readers.class_map import load_class_map

from vitcompress.errors import DataError, shorten

_SYNSET = re.compile(r"n\d{8}")


def class_indices(
    names: Sequence[str], where: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str] = ()
) -> Mapping[str, int]:
    """Return the model's class index of each class of images.

    Args:
        names: names of the images' classes, in the order of their folder, column or shard.
        where: name of the images in messages.
        num_classes: number K of the model's classes; None for as many as there are names.
        class_map: text file with one class name per line, in the order of the model's classes.
        classes: names of the model's classes, in order; empty if unknown.

    Raises:
        DataError: the classes match no mapping.
    """
    if class_map is not None:
        return _mapped(names, where, num_classes, class_map)
    if set(names) == set(classes) if num_classes is None else set(names) <= set(classes):
        return {name: index for index, name in enumerate(classes)}
    if num_classes is None:
        num_classes = len(names)
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset and all(_SYNSET.fullmatch(name) for name in names):
        known = {synset: i for i, synset in enumerate(ImageNetInfo(subset).label_names())}
        missing = [name for name in names if name not in known]
        if not missing:
            return known
        raise DataError(f"{where}: not classes of {subset}: {shorten(missing)}.", hint="Give --class-map FILE.")
    if all(name.isdecimal() and int(name) < num_classes for name in names):
        return {name: int(name) for name in names}
    if len(names) == num_classes:
        numbered = all(name.isdecimal() for name in names)  # sort 1, 2, …, 10 as numbers
        return {name: i for i, name in enumerate(sorted(names, key=int) if numbered else names)}
    count = "1 class" if len(names) == 1 else f"{len(names)} classes"
    raise DataError(
        f"{where} has {count} ({shorten(names, limit=4)}), but the model has {num_classes} classes.",
        hint="Give --class-map FILE with one class name per line, in the order of the model's classes, or images "
        "without labels, such as a flat folder, to measure agreement with the teacher only.",
    )


def are_model_classes(names: Sequence[str], num_classes: int, classes: Sequence[str]) -> bool:
    """Return whether all classes of images are classes of the model, by name or by number.

    Args:
        names: names of the images' classes.
        num_classes: number K of the model's classes.
        classes: names of the model's classes, in order; empty if unknown.
    """
    known = {*classes, *map(str, range(num_classes))} if all(name.isdecimal() for name in names) else set(classes)
    return bool(names) and set(names) <= known


def _mapped(names: Sequence[str], where: str, num_classes: int | None, class_map: Path) -> Mapping[str, int]:
    if not class_map.is_file() or class_map.suffix != ".txt":
        raise DataError(f"--class-map {class_map} is not a .txt file.", hint="It must have one class name per line.")
    try:
        known: dict[str, int] = load_class_map(str(class_map))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class-map {class_map} cannot be read as text: {error}.") from error
    missing = [name for name in names if name not in known]
    if missing:
        raise DataError(f"{where}: not in --class-map {class_map}: {shorten(missing)}.")
    beyond = [name for name in names if num_classes is not None and known[name] >= num_classes]
    if beyond:
        raise DataError(f"--class-map {class_map}: beyond the model's {num_classes} classes: {shorten(beyond)}.")
    return known


def names_in_order(index_of: Mapping[str, int], num_classes: int | None) -> tuple[str, ...]:
    """Return the name of each class, in order; empty if a class has no name.

    Args:
        index_of: class index of each name.
        num_classes: number K of classes; None for as many as there are indices.
    """
    by_index = {index: name for name, index in index_of.items()}
    count = len(by_index) if num_classes is None else num_classes
    return tuple(by_index[i] for i in range(count)) if set(range(count)) <= by_index.keys() else ()


def label_names(pretrained_cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the class names in timm's description of weights; empty if there are none."""
    names = pretrained_cfg.get("label_names")
    return tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) else ()


def known_classes(recorded: Sequence[str], pretrained_cfg: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Return the names of a model's classes, in order; empty if unknown.

    Args:
        recorded: names recorded with the model; empty if there are none.
        pretrained_cfg: timm's description of the model's weights.
        num_classes: number K of the model's classes.
    """
    names = recorded or label_names(pretrained_cfg)
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if not names and subset:
        names = ImageNetInfo(subset).label_names()
    return tuple(names) if len(names) == num_classes else ()
