"""Classes of images and of models, by name and by number."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from vitcompress.errors import DataError, nearest, shorten

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' names of classes without names


@dataclass(frozen=True)
class Numbering:
    """The class index of each class of images.

    Attributes:
        index_of: class index by name, normalized to NFC.
        subject: what is numbered: `12 folders`.
        how: what decided, as the end of a sentence on the subject.
        others: numberings that are as plausible; the teacher's predictions tell them apart.
        has_default: whether this one is used where they do not.
    """

    index_of: Mapping[str, int]
    subject: str
    how: str
    others: tuple[Numbering, ...] = ()
    has_default: bool = True

    def __str__(self) -> str:
        return f"classes: {self.subject} {self.how}"

    @property
    def count(self) -> int:
        """Number of classes: the largest index plus one."""
        return 1 + max(self.index_of.values())

    def indices(self, names: Sequence[str], where: str) -> tuple[int, ...]:
        """Return the class index of each name.

        Raises:
            DataError: a name has no class index; all of them are listed.
        """
        missing = [name for name in names if nfc(name) not in self.index_of]
        if missing:
            near = nearest(missing[0], self.index_of)
            raise DataError(
                f"{where}: not among the {len(self.index_of)} known classes: {shorten(missing, limit=20)}{near}.",
                hint="Rename them, or give --class-map FILE with one class name per line.",
            )
        return tuple(self.index_of[nfc(name)] for name in names)


@dataclass(frozen=True)
class ImageClasses:
    """The classes of images, as their format gives them.

    Attributes:
        names: names in the format's order.
        where: name of the images in messages.
        noun: what the names are names of: folders or labels.
        numbers: class index of each name, where the format gives it.
        named: whether these numbers have names of their own.
        empty: names of class folders without images.
    """

    names: tuple[str, ...]
    where: str
    noun: str = "folders"
    numbers: tuple[int, ...] | None = None
    named: bool = False
    empty: tuple[str, ...] = ()

    def text(self, limit: int = 4) -> str:
        """Return the number of classes with some names."""
        count = "1 class" if len(self.names) == 1 else f"{len(self.names)} classes"
        return f"{count} ({shorten(self.names, limit=limit)})"


@dataclass(frozen=True)
class ModelClasses:
    """The classes of a model.

    Attributes:
        count: number K of classes; None for a new head, which takes the images' classes.
        names: names of the classes, in order; empty if unknown.
    """

    count: int | None
    names: tuple[str, ...] = ()


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form; file systems differ in this."""
    return unicodedata.normalize("NFC", name)


def are_model_classes(names: Sequence[str], model: ModelClasses) -> bool:
    """Return whether all classes of images are classes of the model, by name or by number.

    Args:
        names: names of the images' classes.
        model: the model's classes.
    """
    known = set(map(nfc, model.names))
    if all(name.isdecimal() for name in names):
        known |= set(map(str, range(model.count or 0)))
    return bool(names) and set(map(nfc, names)) <= known


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
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return ()
    return () if all(_PLACEHOLDER.fullmatch(name) for name in names) else tuple(names)


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
