"""Sets of images: the images of a reader that belong to a set, their labels and classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitcompress.data.classes import ImageClasses, Numbering, names_in_order
from vitcompress.data.readers import Reader
from vitcompress.data.streams import StreamReader
from vitcompress.errors import DataError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "eval", "evaluation", "test", "testing")
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
        notes: remarks for every report on these images.
        endless: whether passes over the images cannot be counted.
        numbering: the class index of each class name; None if unlabeled.
        empty: names of class folders without images.
    """

    name: str
    reader: Reader
    labels: Sequence[int] | None
    indices: tuple[int, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    endless: bool = False
    numbering: Numbering | None = None
    empty: tuple[str, ...] = ()

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
        targets: position of each image's class in `classes.names`; None if unlabeled.
        classes: the classes, as the format gives them; None if unlabeled.
        notes: remarks on the images, such as files that were left out.
        endless: whether passes over the images cannot be counted.
        label_fault: why the labels are no classes; raised where they are needed.
    """

    name: str
    reader: Reader
    targets: Sequence[int] | None = None
    classes: ImageClasses | None = None
    notes: tuple[str, ...] = ()
    endless: bool = False
    label_fault: DataError | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.reader.has_labels if isinstance(self.reader, StreamReader) else self.targets is not None


def label_images(images: RawImageSet, numbering: Numbering | None, num_classes: int | None) -> ImageSet:
    """Return the images with class indices of the model as labels.

    Args:
        images: images with the labels of their format.
        numbering: the class index of each class; None to leave labels out.
        num_classes: number K of the model's classes; None to count those of the numbering.

    Raises:
        DataError: a class of the images has no number.
    """
    stream = isinstance(images.reader, StreamReader)
    plain = ImageSet(
        images.name, images.reader, None, () if stream else tuple(range(len(images.reader))), notes=images.notes,
        endless=stream or images.endless,
    )  # fmt: skip
    if numbering is None or not images.has_labels:
        return plain
    classes = names_in_order(numbering.index_of, num_classes)
    labeled = replace(plain, classes=classes, numbering=numbering)
    if isinstance(images.reader, StreamReader):
        return replace(labeled, labels=(), reader=replace(images.reader, index_of=numbering.index_of))
    assert images.classes is not None  # there are labels
    assert images.targets is not None
    indices = numbering.indices(images.classes.names, images.classes.where)
    labels = tuple(indices[target] for target in images.targets)
    return replace(labeled, labels=labels, empty=images.classes.empty)


def renumbered(images: ImageSet, numbering: Numbering) -> ImageSet:
    """Return the images labeled by another numbering of the same classes."""
    if images.numbering is None or images.labels is None or images.streams:
        return images
    moved = {old: numbering.index_of[name] for name, old in images.numbering.index_of.items()}
    labels = tuple(moved[label] for label in images.labels)
    classes = names_in_order(numbering.index_of, len(images.classes)) if images.classes else ()
    return replace(images, labels=labels, numbering=numbering, classes=classes)


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
