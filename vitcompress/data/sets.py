"""Which images, with which labels, belong together?  A reader, the images of it that are meant, and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitcompress.data.classes import class_indices, names_in_order
from vitcompress.data.readers import Reader
from vitcompress.data.streams import StreamLabels, StreamReader
from vitcompress.errors import DataError

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "validation", "valid", "test")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 5000
_HELD_OUT_SHARDS = 8  # most


@dataclass(frozen=True)
class ImageSet:
    """Images and, where there are any, their labels.

    Attributes:
        name: what to call the set in reports.
        reader: opens the images.
        labels: indices into the model's classes, one per image; None where there are none.
        indices: the images of `reader` that belong to the set; empty where it is a stream.
        classes: the name of each of the model's classes, in their order; empty where the images do not tell them all.
        note: what a reader of any report must know of the images; empty where there is nothing.
        endless: there are no passes over them to be counted.
    """

    name: str
    reader: Reader
    labels: Sequence[int] | None
    indices: tuple[int, ...]
    classes: tuple[str, ...] = ()
    note: str = ""
    endless: bool = False

    def __len__(self) -> int:
        if isinstance(self.reader, StreamReader):
            raise DataError(f"{self.name} is a stream: nobody knows how many images it has.", hint=NO_LENGTH_HINT)
        return len(self.indices)

    def __bool__(self) -> bool:
        return True  # a set is there; of a stream nobody knows more

    @property
    def streams(self) -> bool:
        """Whether the images come one after another, so that they can be neither counted nor chosen."""
        return isinstance(self.reader, StreamReader)

    def streamed(self, reader: StreamReader) -> ImageSet:
        """The same stream, read in another way."""
        return replace(self, reader=reader, labels=None if self.labels is None else StreamLabels(reader))

    def subset(self, positions: Sequence[int], name: str) -> ImageSet:
        """The images at `positions`, under another name."""
        return replace(self, name=name, indices=tuple(self.indices[p] for p in positions))


NO_LENGTH_HINT = "Give --steps or --max-minutes, or images that can: a folder, a table or unpacked .tar files."


@dataclass(frozen=True)
class RawImageSet:
    """Images as their format has them, before their labels are the model's.

    Attributes:
        name: what to call them.
        reader: opens them.
        targets: of each, the position of its class in `classes`; None where there are none.
        classes: names of the classes, in the format's order.
    """

    name: str
    reader: Reader
    targets: Sequence[int] | None = None
    classes: tuple[str, ...] = ()


def labelled(
    found: RawImageSet, where: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str]
) -> ImageSet:
    """The same images with labels of the model.

    Args:
        found: what the format has.
        where: what to call it in messages.
        num_classes: K of the model; 0 where it has none: labels are left out then. None for as many as there are.
        class_map: a text file with a class's name per line, in the order of the model's classes.
        classes: names of the model's classes, in order; empty where they are not known.

    Raises:
        DataError: its classes match no mapping.
    """
    if isinstance(found.reader, StreamReader):
        return _labelled_stream(found.name, found.reader, where, num_classes, class_map, classes)
    everything = tuple(range(len(found.reader)))
    if found.targets is None or num_classes == 0:
        return ImageSet(found.name, found.reader, None, everything)
    index_of = class_indices(found.classes, where, num_classes, class_map, classes)
    labels = tuple(index_of[found.classes[target]] for target in found.targets)
    return ImageSet(found.name, found.reader, labels, everything, names_in_order(index_of, num_classes))


def _labelled_stream(
    name: str, reader: StreamReader, where: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str]
) -> ImageSet:
    """A stream whose labels are read as they come: names of the model's classes, or their numbers."""
    if not reader.has_labels or num_classes == 0:
        return ImageSet(name, reader, None, (), endless=True)
    names: Sequence[str] = classes
    if class_map is not None:
        index_of: Mapping[str, int] = class_indices((), where, num_classes, class_map)
        names = names_in_order(index_of, num_classes)
    elif num_classes is None:
        raise DataError(
            f"{where} is a stream: its classes are not known before its end.",
            hint="Give --class-map FILE with a class's name per line.",
        )
    else:
        index_of = {each: number for number, each in enumerate(classes)}
    count = len(names) if num_classes is None else num_classes
    index_of = {**{str(number): number for number in range(count)}, **index_of}
    reader = replace(reader, index_of=index_of)
    return ImageSet(name, reader, StreamLabels(reader), (), tuple(names), endless=True)


def hold_out(images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a tenth off, at most 5,000 images, at random by `seed`; the rest comes first. Of a stream, shards.

    Raises:
        DataError: there are too few.
    """
    if isinstance(images.reader, StreamReader):
        return _hold_out_shards(images, images.reader, seed=seed)
    count = max(1, min(HELD_OUT_MOST, round(len(images) * HELD_OUT_SHARE)))
    if count >= len(images):
        raise DataError(f"{images.name} has {len(images)} image(s): too few to hold any out.", hint="Give --val-data.")
    order = np.random.default_rng(seed).permutation(len(images))
    held = images.subset(sorted(order[:count]), f"{images.name} ({count} held out of training)")
    return images.subset(sorted(order[count:]), images.name), held


def _hold_out_shards(images: ImageSet, reader: StreamReader, *, seed: int) -> tuple[ImageSet, ImageSet]:
    shards = reader.urls
    count = max(1, min(_HELD_OUT_SHARDS, round(len(shards) * HELD_OUT_SHARE)))
    if count >= len(shards):
        raise DataError(f"{images.name} is one shard: there is none to hold out.", hint="Give --val-data.")
    held = set(np.random.default_rng(seed).permutation(len(shards))[:count].tolist())
    parts = [tuple(url for number, url in enumerate(shards) if (number in held) is out) for out in (False, True)]
    rest, out = replace(reader, urls=parts[0]), replace(reader, urls=parts[1], limit=HELD_OUT_MOST)
    name = f"{images.name} ({count} shard(s) held out of training)"
    return images.streamed(rest), replace(images.streamed(out), name=name)
