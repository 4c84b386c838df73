"""Sets of images: the images of a reader that belong to a set, their labels and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitcompress.data.classes import class_indices, names_in_order
from vitcompress.data.readers import Reader
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "validation", "valid", "test")
HELD_OUT_FRACTION, MAX_HELD_OUT = 0.1, 5000
_MAX_HELD_OUT_SHARDS = 8


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, if any.

    Attributes:
        name: name of the set in reports.
        reader: opens the images.
        labels: class index of each image of `reader`, among the model's classes; None if unlabeled;
            empty for a stream, whose labels are read with its images.
        indices: positions in `reader` of the images of the set; empty for a stream.
        classes: names of the model's classes, in order; empty if the images do not name them all.
        note: remark for every report on these images; empty if there is none.
        endless: whether passes over the images cannot be counted.
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
            raise DataError(f"{self.name} is a stream of unknown length.", hint=NO_LENGTH_HINT)
        return len(self.indices)

    def __bool__(self) -> bool:
        return True  # an image set is never empty; a stream has no length to ask for

    @property
    def streams(self) -> bool:
        """Whether the images come one after another and cannot be counted or chosen."""
        return isinstance(self.reader, StreamReader)

    def label(self, index: int) -> int:
        """Return the class index of image `index` of `reader`; -1 if unlabeled."""
        if isinstance(self.reader, StreamReader):
            return self.reader.label(index)
        return -1 if self.labels is None else self.labels[index]

    def subset(self, positions: Sequence[int], name: str) -> ImageSet:
        """Return the images at `positions` of the set, under another name."""
        return replace(self, name=name, indices=tuple(self.indices[p] for p in positions))


NO_LENGTH_HINT = "Give --steps or --max-minutes, or countable images: a folder, a table or unpacked .tar files."


@dataclass(frozen=True)
class RawImageSet:
    """Images with the labels of their format, before these become class indices of the model.

    Attributes:
        name: name of the images.
        reader: opens the images.
        targets: position of each image's class in `classes`; None if unlabeled.
        classes: names of the classes, in the format's order.
    """

    name: str
    reader: Reader
    targets: Sequence[int] | None = None
    classes: tuple[str, ...] = ()


def label_images(
    images: RawImageSet, where: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str]
) -> ImageSet:
    """Return the images with class indices of the model as labels.

    Args:
        images: images with the labels of their format.
        where: name of the images in messages.
        num_classes: number K of the model's classes; 0 if it has none, so that labels are left out;
            None to count the images' classes.
        class_map: text file with one class name per line, in the order of the model's classes.
        classes: names of the model's classes, in order; empty if unknown.

    Raises:
        DataError: the classes of the images match no mapping.
    """
    if isinstance(images.reader, StreamReader):
        return _labeled_stream(images.name, images.reader, where, num_classes, class_map, classes)
    indices = tuple(range(len(images.reader)))
    if images.targets is None or num_classes == 0:
        return ImageSet(images.name, images.reader, None, indices)
    index_of = class_indices(images.classes, where, num_classes, class_map, classes)
    labels = tuple(index_of[images.classes[target]] for target in images.targets)
    return ImageSet(images.name, images.reader, labels, indices, names_in_order(index_of, num_classes))


def _labeled_stream(
    name: str, reader: StreamReader, where: str, num_classes: int | None, class_map: Path | None, classes: Sequence[str]
) -> ImageSet:
    """Return a stream whose labels are names or numbers of the model's classes, read on the way."""
    if not reader.has_labels or num_classes == 0:
        return ImageSet(name, reader, None, (), endless=True)
    names: Sequence[str] = classes
    if class_map is not None:
        index_of: Mapping[str, int] = class_indices((), where, num_classes, class_map)
        names = names_in_order(index_of, num_classes)
    elif num_classes is None:
        raise DataError(
            f"{where} is a stream, so its classes are not known in advance.",
            hint="Give --class-map FILE with one class name per line.",
        )
    else:
        index_of = {name: number for number, name in enumerate(classes)}
    count = len(names) if num_classes is None else num_classes
    index_of = {**{str(number): number for number in range(count)}, **index_of}
    reader = replace(reader, index_of=index_of)
    return ImageSet(name, reader, (), (), tuple(names), endless=True)


def hold_out(images: ImageSet, *, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out a random tenth of the images, at most 5,000; of a stream, whole shards.

    Args:
        images: the images to split.
        seed: decides which images are held out.

    Returns:
        The remaining images, and those held out.

    Raises:
        DataError: there are too few images or shards.
    """
    if isinstance(images.reader, StreamReader):
        return _hold_out_shards(images, images.reader, seed=seed)
    count = max(1, min(MAX_HELD_OUT, round(len(images) * HELD_OUT_FRACTION)))
    if count >= len(images):
        raise DataError(f"{images.name} has {len(images)} image(s), too few to hold any out.", hint="Give --val-data.")
    order = np.random.default_rng(seed).permutation(len(images))
    held = images.subset(sorted(order[:count]), f"{images.name} ({count} held out of training)")
    return images.subset(sorted(order[count:]), images.name), held


def _hold_out_shards(images: ImageSet, reader: StreamReader, *, seed: int) -> tuple[ImageSet, ImageSet]:
    shards = reader.urls
    count = max(1, min(_MAX_HELD_OUT_SHARDS, round(len(shards) * HELD_OUT_FRACTION)))
    if count >= len(shards):
        raise DataError(f"{images.name} is a single shard, so none can be held out.", hint="Give --val-data.")
    numbers = set(np.random.default_rng(seed).permutation(len(shards))[:count].tolist())
    kept, held = (
        tuple(url for number, url in enumerate(shards) if (number in numbers) is out) for out in (False, True)
    )
    name = f"{images.name} ({count} shard(s) held out of training)"
    held_out = replace(images, name=name, reader=replace(reader, urls=held, limit=MAX_HELD_OUT))
    return replace(images, reader=replace(reader, urls=kept)), held_out
