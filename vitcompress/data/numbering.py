"""Decide once per run which class of the model each class of images is.

What decides, in this order: `--class-map`; `--class-order`; names that the model knows; numbers
that the data set itself gives; ImageNet's synsets; numbers as names; the order of the names. Where
the orders of timm and of torchvision differ, the teacher's predictions decide
(`vitcompress.pipeline.labels`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key

from vitcompress.data.classes import ImageClasses, ModelClasses, Numbering, nfc
from vitcompress.errors import DataError, shorten
from vitcompress.recipe import DataRecipe

HINT_ORDER = (
    "Give --class-map FILE with one class name per line, in the order of the model's classes; or, for as many folders "
    "as classes, --class-order natural (as timm) or ascii (as torchvision)."
)
_SYNSET = re.compile(r"n\d{8}")


class _Asked(NamedTuple):
    """What is numbered; fields as the arguments of `number_classes`."""

    images: ImageClasses
    model: ModelClasses
    recipe: DataRecipe
    also: Sequence[str]


def number_classes(
    images: ImageClasses, model: ModelClasses, recipe: DataRecipe, also: Sequence[str] = ()
) -> Numbering:
    """Decide the class index of each class of images.

    Args:
        images: the classes of the training images; of the images to evaluate on, without these.
        model: the model's classes.
        recipe: the class map and the order of classes.
        also: names of classes of the other images.

    Raises:
        DataError: the classes match no numbering.
    """
    twice = [name for name in images.names if [*map(nfc, images.names)].count(nfc(name)) > 1]
    if twice:
        raise DataError(
            f"{images.where}: {images.noun} whose names differ only in their Unicode form: {shorten(twice)}.",
            hint="Rename or merge them.",
        )
    deciders = (_by_map, _by_given_order, _by_known_names, _by_format, _by_synsets, _by_numbers, _by_order)
    for decide in deciders:
        numbering = decide(_Asked(images, model, recipe, also))
        if numbering is not None:
            return numbering
    if model.names and len(images.names) == model.count:
        raise DataError(
            f"{images.where} has {images.text()}, and none of them is one of the model's classes "
            f"({shorten(model.names, limit=4)}).",
            hint=HINT_ORDER,
        )
    raise _mismatch(images, model)


def _mismatch(images: ImageClasses, model: ModelClasses) -> DataError:
    return DataError(
        f"{images.where} has {images.text()}, but the model has {model.count} classes.",
        hint=f"{HINT_ORDER} Images without labels, such as a flat folder, measure agreement with the teacher only.",
    )


def number_stream(where: str, model: ModelClasses, recipe: DataRecipe) -> Numbering:
    """Decide the class index of each label of a stream, whose labels are not known in advance.

    Args:
        where: name of the images in messages.
        model: the model's classes.
        recipe: the class map.

    Raises:
        DataError: nothing names the classes.
    """
    if recipe.class_map is not None:
        known = read_class_map(recipe.class_map)
        how = f"numbered by --class-map {recipe.class_map}"
    elif model.count is None or recipe.class_order is not None:
        raise DataError(
            f"{where} is a stream, so its classes are not known in advance.",
            hint="Give --class-map FILE with one class name per line.",
        )
    else:
        known = {nfc(name): number for number, name in enumerate(model.names)}
        how = "are numbers from 0" + (", or the names of the model's classes" if known else "")
    count = len(known) if model.count is None else model.count
    return Numbering({**{str(number): number for number in range(count)}, **known}, "labels", how)


def _by_map(asked: _Asked) -> Numbering | None:
    images, model, recipe, also = asked
    path = recipe.class_map
    if path is None:
        return None
    known = read_class_map(path)
    names = dict.fromkeys((*images.names, *also))
    missing = [name for name in names if nfc(name) not in known]
    if missing:
        raise DataError(f"{images.where}: not in --class-map {path}: {shorten(missing, limit=20)}.")
    beyond = [name for name in names if model.count is not None and known[nfc(name)] >= model.count]
    if beyond:
        raise DataError(f"--class-map {path}: beyond the model's {model.count} classes: {shorten(beyond)}.")
    return Numbering(known, _count(images), f"numbered by --class-map {path}")


def read_class_map(path: Path) -> dict[str, int]:
    """Return the class index of each name in a class map, normalized to NFC.

    Raises:
        DataError: the file is not text, or names a class twice.
    """
    if not path.is_file() or path.suffix != ".txt":
        raise DataError(f"--class-map {path} is not a .txt file.", hint="It must have one class name per line.")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class-map {path} cannot be read as text: {error}.") from error
    names = [nfc(line.strip()) for line in lines]
    while names and not names[-1]:
        names.pop()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"--class-map {path}: several lines are {shorten(map(repr, twice))}.")
    return {name: number for number, name in enumerate(names)}


def _by_given_order(asked: _Asked) -> Numbering | None:
    images, model, recipe, _ = asked
    if recipe.class_order is None:
        return None
    names = _as_many(images, model)
    if names is None:
        raise _mismatch(images, model)
    return _ordered(images, names, recipe.class_order, f" (--class-order {recipe.class_order})")


def _by_known_names(asked: _Asked) -> Numbering | None:
    images, model, _, _ = asked
    known = {nfc(name): number for number, name in enumerate(model.names)}
    names = {nfc(name) for name in images.names}
    if not names & known.keys() or (model.count is None and names != known.keys()):
        return None
    if not names <= known.keys() and images.numbers is not None and len(images.names) == len(known):
        given = zip(images.names, images.numbers, strict=True)
        if all(known.get(nfc(name), number) == number for name, number in given):
            return None  # a table whose numbers agree spells some names in another way
    numbering = Numbering(known, _count(images), "named like the model's classes")
    numbering.indices(images.names, images.where)
    return numbering


def _by_format(asked: _Asked) -> Numbering | None:
    images, model, _, also = asked
    if images.numbers is None:
        return None
    if model.count is None:  # a new head has no class without images
        given = dict(zip(map(nfc, images.names), images.numbers, strict=True))
        index_of = {name: number for number, name in enumerate(sorted(given, key=given.__getitem__))}
        return Numbering(index_of, _count(images), "in the order of the data set")
    if images.named and len(images.names) != model.count:
        return None
    others = () if images.named else tuple(name for name in also if name not in images.names and name.isdecimal())
    numbers = (*images.numbers, *map(int, others))
    return _numbered(images, (*images.names, *others), numbers, model.count, "numbered by the data set")


def _by_synsets(asked: _Asked) -> Numbering | None:
    images, model, _, _ = asked
    subset = infer_imagenet_subset({"num_classes": model.count}) if model.count else None
    if not subset or not all(_SYNSET.fullmatch(name) for name in images.names):
        return None
    known = {synset: number for number, synset in enumerate(ImageNetInfo(subset).label_names())}
    missing = [name for name in images.names if name not in known]
    if missing:
        raise DataError(f"{images.where}: not classes of {subset}: {shorten(missing)}.", hint="Give --class-map FILE.")
    return Numbering(known, _count(images), "named by ImageNet's synsets")


def _by_numbers(asked: _Asked) -> Numbering | None:
    images, model, _, also = asked
    names = tuple(dict.fromkeys((*images.names, *also)))
    if model.count is None or not all(name.isdecimal() for name in names):
        return None
    numbers = tuple(map(int, names))
    if len(set(numbers)) < len(numbers):
        return None
    numbering = _numbered(images, names, numbers, model.count, "named by numbers")
    if numbering is None or len(images.names) != model.count:
        return numbering
    ascii_order = _ordered(images, images.names, "ascii", ", as torchvision numbers them")
    others = (*numbering.others, *(() if _same(ascii_order, numbering) else (ascii_order,)))
    return replace(numbering, others=others)


def _numbered(
    images: ImageClasses, names: Sequence[str], numbers: Sequence[int], count: int, how: str
) -> Numbering | None:
    """Take numbers as class indices, from 0 or from 1; None where they are beyond the model's."""
    from_zero = {nfc(name): number for name, number in zip(names, numbers, strict=True)}
    less_one = {name: number - 1 for name, number in from_zero.items()}
    from_one = Numbering(less_one, _count(images), f"{how}, counted from 1")
    if min(numbers) < 0 or max(numbers) > count or (min(numbers) == 0 and max(numbers) == count):
        return None
    if max(numbers) == count:
        return from_one
    return Numbering(from_zero, _count(images), f"{how}, counted from 0", (from_one,) if min(numbers) > 0 else ())


def _by_order(asked: _Asked) -> Numbering | None:
    images, model, _, _ = asked
    names = _as_many(images, model)
    if names is None or (model.names and model.count is not None):
        return None
    natural = _ordered(images, sorted(names), "natural", ", as timm numbers them")
    if model.count is None:
        return natural
    others: list[Numbering] = []
    for other in _other_orders(images, names):
        if not any(_same(other, known) for known in (natural, *others)):
            others.append(other)
    if not others:
        return replace(natural, how="in alphabetical order")
    return replace(natural, others=tuple(others), has_default=False)


def _other_orders(images: ImageClasses, names: Sequence[str]) -> Iterator[Numbering]:
    """Yield what the model may have been trained with, besides timm's order of these names.

    Accented letters sort differently where a file system decomposes them, and timm leaves the order
    of names open that differ only in case or in leading zeros.
    """
    yield _ordered(images, names, "ascii", ", as torchvision numbers them")
    yield _ordered(images, sorted(names, reverse=True), "natural", ", with equal names the other way round")
    for form, shown in (("NFC", "composed"), ("NFD", "decomposed")):
        for order in ("natural", "ascii"):
            yield _ordered(images, names, order, f" of {shown} accents", form=form)


def _as_many(images: ImageClasses, model: ModelClasses) -> tuple[str, ...] | None:
    """Return the names of as many classes as the model has; None if there are more or fewer."""
    names = images.names
    if model.count is None or len(names) == model.count:
        return names
    with_empty = (*names, *images.empty)  # a class without images still has its number
    return with_empty if len(with_empty) == model.count else None


def _ordered(images: ImageClasses, names: Iterable[str], order: str, why: str, *, form: str = "") -> Numbering:
    """Number classes in the order of their names: natural, as timm, or ascii, as torchvision.

    Args:
        images: the classes.
        names: their names; those that are equal in natural order stay in this order.
        order: natural or ascii.
        why: end of the sentence on the order.
        form: Unicode form of the names in which they are sorted; empty for the names as they are.
    """

    def key(name: str) -> Any:
        name = unicodedata.normalize(form, name) if form else name  # type: ignore[arg-type]
        return natural_key(name) if order == "natural" else name

    index_of = {nfc(name): number for number, name in enumerate(sorted(names, key=key))}
    shown = "natural" if order == "natural" else "ASCII"
    return Numbering(index_of, _count(images), f"in {shown} order{why}")


def _same(one: Numbering, other: Numbering) -> bool:
    return all(other.index_of.get(name, number) == number for name, number in one.index_of.items())


def _count(images: ImageClasses) -> str:
    noun = images.noun[:-1] if len(images.names) == 1 else images.noun
    return f"{len(images.names)} {noun}"
