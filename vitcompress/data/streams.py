"""Read shards from front to back, in lanes, in an order that only the seed decides.

    lane 0   shards 0, 8, 16, …   →  shuffle buffer  →  batches 0, 8, 16, …
    lane 1   shards 1, 9, 17, …   →  shuffle buffer  →  batches 1, 9, 17, …

Image `n` of the stream is the same for any number of workers and processes, because each of them
reads the lane of an image up to that image. If the number of lanes is a multiple of the number of
readers, nothing is read twice.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby, islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitcompress.data.classes import nfc
from vitcompress.data.readers import decode
from vitcompress.data.tarfiles import BROKEN, Member, dotted_error, find_members, is_image, is_remote, read_member

MAX_LANES = 8  # a power of two, like most numbers of workers and processes
BUFFER = 256  # undecoded samples in the shuffle buffer of a lane
_BROKEN = (*BROKEN, zlib.error)  # raised by files that are cut off or not tar files


class ShardSample(NamedTuple):
    """An undecoded image of a shard, with its label.

    Attributes:
        where: name of the image in messages.
        image: content of the image file.
        target: the label as text; None if there is none.
        error: why there is no image; empty if there is one.
    """

    where: str
    image: bytes
    target: str | None
    error: str = ""


@dataclass(frozen=True)
class StreamReader:
    """An endless stream of the images of shards; reading forward is cheap, going back is not.

    Attributes:
        urls: paths or URLs of the shards: http(s)://… or pipe:….
        image_key: extension of the images; empty for any known one.
        label_key: extension of the labels.
        has_labels: whether the images have labels.
        index_of: class index of each label, among the model's classes.
        seed: decides the order.
        block: number of successive images from one lane, those of a batch.
        start: number of images that `one_pass` skips at the beginning.
        limit: maximum number of images of `one_pass`; None for all.
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
        """The largest power of two that exceeds neither the number of shards nor 8."""
        return 1 << (min(MAX_LANES, len(self.urls)).bit_length() - 1)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index` of the endless, shuffled stream."""
        return self.decode(self._sample(index), at_least)

    def where(self, index: int) -> str:
        """Return the shard of image `index`, and its name there."""
        return self._sample(index).where

    def label(self, index: int) -> int:
        """Return the label of image `index`."""
        return self.label_of(self._sample(index))

    def decode(self, sample: ShardSample, at_least: int = 0) -> Image.Image:
        """Decode a sample.

        Raises:
            ValueError: the shard is broken, or the label is unknown.
        """
        if sample.error:
            raise ValueError(sample.error)
        self.label_of(sample)  # checked first, because decoding is slow
        return decode(sample.image, at_least)

    def label_of(self, sample: ShardSample) -> int:
        """Return the label of a sample; -1 if the images have no labels.

        Raises:
            ValueError: the label is not a class of the model.
        """
        if sample.target is not None and not self.has_labels:
            raise ValueError(f"it has a label (.{self.label_key}), and the first image of the shards has none")
        if not self.has_labels or not self.index_of:
            return -1
        if sample.target is None or nfc(sample.target) not in self.index_of:
            raise ValueError(
                f"its label {sample.target!r} (.{self.label_key}) is not a class of the model; numbers count from 0, "
                "and --class-map FILE gives names"
            )
        return self.index_of[nfc(sample.target)]

    def draw(self, number: int, *, after: int, seed: int) -> StreamReader:
        """Return a reader of `number` images of shuffled shards, after skipping `after` of them.

        It goes on from the start at the end.
        """
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
        """Yield the samples of a lane, shuffled, pass after pass."""
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
    """A lane and the position up to which it has been read."""

    def __init__(self, reader: StreamReader, number: int) -> None:
        self.reader, self.number = reader, number
        self.samples = reader.in_lane(number)
        self.position, self.last = -1, ShardSample("", b"", None)

    def at(self, position: int) -> ShardSample:
        if position < self.position:  # reading began anew
            self.samples, self.position = self.reader.in_lane(self.number), -1
        while self.position < position:
            self.last = next(self.samples)
            self.position += 1
        return self.last


def read_shard(url: str, image_key: str, label_key: str) -> Iterator[ShardSample]:
    """Yield the images of a shard in order; if it breaks off, a last sample says why.

    Args:
        url: path, http(s)://… or pipe:….
        image_key: extension of the images; empty for any known one.
        label_key: extension of the labels.
    """
    from webdataset.gopen import gopen

    try:
        with (
            gopen(url) if is_remote(url) else open(url, "rb") as stream,  # gopen runs commands
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=Member) as tar,
        ):
            dotted: dict[str, str] = {}
            members = find_members(tar, image_key, label_key, dotted=dotted)
            for key, files in groupby(members, key=itemgetter(0)):  # the files of a sample are neighbors
                contents: dict[str, bytes] = {}
                for _, extension, member in files:
                    if extension in contents:
                        raise ValueError(f"{member.name}: duplicate file name in tar file")
                    contents[extension] = read_member(tar, member)
                image = next((extension for extension in contents if is_image(extension, image_key)), None)
                if image is None and label_key in contents:
                    yield ShardSample(f"{url}:{key}", b"", None, "the sample has a label and no image of a known type")
                elif image is not None:
                    dotted.pop(key, None)
                    target = contents[label_key].decode("utf-8", "replace").strip() if label_key in contents else None
                    yield ShardSample(f"{url}:{key}.{image}", contents[image], target)
            for name in dotted.values():
                yield ShardSample(url, b"", None, dotted_error(name))
    except _BROKEN as error:
        yield ShardSample(url, b"", None, f"the shard cannot be read: {error}")
