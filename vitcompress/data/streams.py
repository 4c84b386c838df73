"""How are shards read that can only be read from front to back?  In lanes, so that the order hangs on the seed alone.

    lane 0   shards 0, 8, 16, …   →  shuffle buffer  →  batches 0, 8, 16, …
    lane 1   shards 1, 9, 17, …   →  shuffle buffer  →  batches 1, 9, 17, …

Image `n` of the stream is the same for any number of workers and processes: who asks for it reads its lane up to it.
With as many lanes as a multiple of the readers, nothing is read twice.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import IO, Any, NamedTuple, overload

import numpy as np
from PIL import Image

from vitcompress.data.readers import EXTENSIONS, decoded
from vitcompress.data.tarfiles import BROKEN, Member, content, is_remote, wanted

LANES = 8  # most; a power of two, as numbers of workers and processes mostly are
BUFFER = 256  # samples of a lane, undecoded, that are shuffled
_BROKEN = (*BROKEN, zlib.error)  # what a shard that ends early or is none raises


class ShardSample(NamedTuple):
    """One image as it lies in its shard; `error` says why there is none."""

    where: str
    image: bytes
    target: str | None
    error: str = ""


@dataclass(frozen=True)
class StreamReader:
    """Images of shards that can only be read from front to back, over and over; forward is cheap, back is not.

    Attributes:
        urls: of the shards: paths, http(s)://… or pipe:….
        image_key: extension of the images; empty for any that is known.
        label_key: extension of the labels.
        has_labels: whether there are any.
        index_of: the model's class of each label.
        seed: of the order.
        block: images that follow each other in one lane: those of a batch.
        start: images that one pass leaves out at its beginning.
        limit: most images of one pass; None for all.
    """

    urls: tuple[str, ...]
    image_key: str = ""
    label_key: str = "cls"
    has_labels: bool = False
    index_of: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    block: int = 1
    start: int = 0
    limit: int | None = None
    _lanes: dict[int, _Lane] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    @property
    def num_lanes(self) -> int:
        """The largest power of two that is neither more than the shards nor than 8."""
        return 1 << (min(LANES, len(self.urls)).bit_length() - 1)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index` of the endless, shuffled stream."""
        return self.decoded(self._sample(index), at_least)

    def where(self, index: int) -> str:
        """The shard of image `index`, and its name in it."""
        return self._sample(index).where

    def label(self, index: int) -> int:
        """The label of image `index`."""
        return self.label_of(self._sample(index))

    def decoded(self, sample: ShardSample, at_least: int = 0) -> Image.Image:
        """Decode a sample.

        Raises:
            ValueError: its shard is broken, or its label means nothing.
        """
        if sample.error:
            raise ValueError(sample.error)
        self.label_of(sample)  # before the work
        return decoded(sample.image, at_least)

    def label_of(self, sample: ShardSample) -> int:
        """The label of a sample; −1 where there are none.

        Raises:
            ValueError: it is none of the model's classes.
        """
        if not self.has_labels or not self.index_of:
            return -1
        if sample.target is None or sample.target not in self.index_of:
            raise ValueError(f"its label {sample.target!r} (.{self.label_key}) is none of the model's classes")
        return self.index_of[sample.target]

    def drawn(self, number: int, *, after: int, seed: int) -> StreamReader:
        """`number` images of shuffled shards, without the first `after`; at the end it goes on from the start."""
        order = np.random.default_rng(seed).permutation(len(self.urls))
        return replace(self, urls=tuple(self.urls[i] for i in order), start=after, limit=number)

    def one_pass(self) -> Iterator[ShardSample]:
        """Every image once, in order; of a part of the stream, as many as it has."""
        if self.limit is None or self.start == 0:
            yield from islice(self._through(self.urls), self.limit)
            return
        endless = (sample for _ in count() for sample in self._through(self.urls))
        yield from islice(endless, self.start, self.start + self.limit)

    def _sample(self, index: int) -> ShardSample:
        block, offset = divmod(index, self.block)
        turn, number = divmod(block, self.num_lanes)
        lane = self._lanes.setdefault(number, _Lane(self, number))
        return lane.at(turn * self.block + offset)

    def in_lane(self, number: int) -> Iterator[ShardSample]:
        """The samples of a lane, shuffled, pass after pass."""
        urls = self.urls[number :: self.num_lanes]
        for turn in count():
            random = np.random.default_rng([self.seed, number, turn])
            samples = self._through([urls[i] for i in random.permutation(len(urls))])
            buffer = list(islice(samples, BUFFER))
            if not buffer:
                yield ShardSample(urls[0], b"", None, "the shard has no images")
            for sample in samples:
                position = int(random.integers(len(buffer)))
                chosen, buffer[position] = buffer[position], sample
                yield chosen
            for position in random.permutation(len(buffer)):
                yield buffer[position]

    def _through(self, urls: Sequence[str]) -> Iterator[ShardSample]:
        for url in urls:
            yield from read_shard(url, self.image_key, self.label_key)


class _Lane:
    """One lane, and how far it has been read."""

    def __init__(self, reader: StreamReader, number: int) -> None:
        self.reader, self.number = reader, number
        self.samples = reader.in_lane(number)
        self.position, self.last = -1, ShardSample("", b"", None)

    def at(self, position: int) -> ShardSample:
        if position < self.position:  # someone began anew
            self.samples, self.position = self.reader.in_lane(self.number), -1
        while self.position < position:
            self.last = next(self.samples)
            self.position += 1
        return self.last


class StreamLabels(Sequence[int]):
    """The labels of a stream, each known when its image is."""

    def __init__(self, reader: StreamReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            raise TypeError("a stream has no slices")
        return self.reader.label(index)


def read_shard(url: str, image_key: str, label_key: str) -> Iterator[ShardSample]:
    """The images of a shard in order; where it cannot be read on, one last sample says why.

    Args:
        url: path, http(s)://… or pipe:….
        image_key: extension of the images; empty for any that is known.
        label_key: extension of the labels.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    try:
        with gopen(url) if is_remote(url) else open(url, "rb") as stream:  # gopen runs what looks like a command
            for found in group_by_keys(_files(url, stream, image_key, label_key)):
                key = image_key_of(found, image_key)
                if key is not None:
                    yield ShardSample(f"{url}:{found['__key__']}.{key}", found[key], target_of(found, label_key))
    except _BROKEN as error:
        yield ShardSample(url, b"", None, f"the shard cannot be read: {error}")


def _files(url: str, stream: IO[bytes], image_key: str, label_key: str) -> Iterator[dict[str, Any]]:
    """The images and labels of a shard, as webdataset groups them into samples."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=Member) as tar:
        for _, _, member in wanted(tar, image_key, label_key):
            yield {"fname": member.name, "data": content(tar, member), "__url__": url}


def image_key_of(sample: Mapping[str, object], wanted: str) -> str | None:
    """The extension of a sample's image; None where it has none."""
    if wanted:
        return wanted if wanted in sample else None
    return next((key for key in sample if f".{key}" in EXTENSIONS), None)


def target_of(sample: Mapping[str, bytes], key: str) -> str | None:
    """The label of a sample as text; None where it has none."""
    return sample[key].decode("utf-8", "replace").strip() if key in sample else None
