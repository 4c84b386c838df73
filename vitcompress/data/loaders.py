"""Data loaders of training and evaluation, in an order that only the seed decides."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import ShardSample, StreamReader
from vitcompress.data.views import UNREADABLE, View, Views
from vitcompress.data.workers import Loader, fitting_workers
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.console import local_processes

T = TypeVar("T")
Key = tuple[int, int]  # position in the image set, number of the draw
_MAX_WORKERS = 16


class Batch(NamedTuple):
    """Images and labels of a batch; a tuple, so that accelerate can move it to a device.

    Attributes:
        images: `[B, C, H, W]`, normalized.
        labels: `[B]` int64; -1 for an image without label.
        bad: unreadable images, which are not in `images`, and why they are unreadable.
    """

    images: Tensor
    labels: Tensor
    bad: tuple[str, ...]


@dataclass(frozen=True)
class ProcessShare:
    """The part of each step's images that a process takes.

    Attributes:
        process: number of the process.
        num_processes: number of processes.
        accumulate: number of batches that each process splits its part into.
    """

    process: int = 0
    num_processes: int = 1
    accumulate: int = 1

    def cut(self, keys: Sequence[T]) -> Iterator[Sequence[T]]:
        """Yield the process's batches of a step's images.

        Mixing pairs the first image of a batch with the last, the second with the last but one, and
        so on. Batches with an even number of images get whole pairs, so that mixing pairs the same
        images for any number of processes.
        """
        parts = self.num_processes * self.accumulate
        size = len(keys) // parts
        for number in range(self.accumulate):
            part = number * self.num_processes + self.process
            if size % 2:
                yield keys[part * size : (part + 1) * size]
            else:
                half, end = size // 2, len(keys) - part * (size // 2)
                yield [*keys[part * half : (part + 1) * half], *keys[end - half : end]]


def process_share(accelerator: Accelerator, *, accumulate: int = 1) -> ProcessShare:
    """Return the share of this process.

    Args:
        accelerator: knows the number of the process.
        accumulate: number of batches that each process splits its part into.
    """
    return ProcessShare(accelerator.process_index, accelerator.num_processes, accumulate)


class ShuffledBatches(Sampler[list[Key]]):
    """Batches of `(position, draw)`: full batches of successive shuffled passes over the images.

    Args:
        num_images: number of images; None for a stream, which keeps its own order.
        batch_size: images per step.
        seed: decides the order, with the number of the pass.
        num_steps: number of steps; None for an endless stream.
        repeats: number of successive draws of each image.
        start: first step.
        share: this process's part of each step.

    Source: repeated augmentation, Hoffer et al. 2019, arXiv:1901.09335; in the order of timm's
        RepeatAugSampler.
    """

    def __init__(
        self, num_images: int | None, batch_size: int, *, seed: int, num_steps: int | None, repeats: int = 1,
        start: int = 0, share: ProcessShare | None = None,
    ) -> None:  # fmt: skip
        self.num_images, self.batch_size, self.seed, self.num_steps = num_images, batch_size, seed, num_steps
        self.repeats, self.start, self.share = repeats, start, share or ProcessShare()

    def __iter__(self) -> Iterator[list[Key]]:
        draws = self._draws(self.start * self.batch_size)
        for _ in itertools.count() if self.num_steps is None else range(self.start, self.num_steps):
            keys = list(itertools.islice(draws, self.batch_size))
            yield from map(list, self.share.cut(keys))

    def _draws(self, first: int) -> Iterator[Key]:
        draw = itertools.count(first)
        if self.num_images is None:
            yield from ((number // self.repeats, number) for number in draw)
            return
        first_pass, skipped = divmod(first, self.num_images * self.repeats)
        for number in itertools.count(first_pass):
            order = np.random.default_rng([self.seed, number]).permutation(self.num_images).repeat(self.repeats)
            for position in order[skipped:].tolist():
                yield position, next(draw)
            skipped = 0


def training_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, *, seed: int, num_steps: int | None,
    start: int = 0, share: ProcessShare | None = None,
) -> DataLoader[Any]:  # fmt: skip
    """Return a loader of random views in shuffled batches, `recipe.step_images` images per step.

    Args:
        images: images to train on.
        config: timm's data config.
        recipe: batch size, workers and augmentation.
        seed: decides order and views.
        num_steps: number of steps; None for an endless loader.
        start: first step.
        share: this process's part of each step.
    """
    if isinstance(images.reader, StreamReader):  # each batch comes from one lane
        block = max(1, recipe.step_images // recipe.repeats)
        images = replace(images, reader=replace(images.reader, seed=seed, block=block))
    views = Views(images, config, training=True, recipe=recipe, seed=seed)
    count = None if images.streams else len(images)
    stream = ShuffledBatches(
        count, recipe.step_images, seed=seed, num_steps=num_steps, repeats=recipe.repeats, start=start, share=share
    )
    share = share or ProcessShare()
    size = recipe.step_images // (share.num_processes * share.accumulate)
    number = _num_workers(recipe, images, _Room(size, config, 2 * share.accumulate))
    return Loader(views, batch_sampler=stream, collate_fn=collate, **_loader_options(number))


def evaluation_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, share: ProcessShare | None = None,
    batch_size: int | None = None,
) -> DataLoader[Any]:  # fmt: skip
    """Return a loader of center crops in order, every image once.

    Args:
        images: images to evaluate on.
        config: timm's data config.
        recipe: batch size and workers.
        share: of P processes, each takes every P-th batch.
        batch_size: images per batch; default: `recipe.step_images`.
    """
    batch_size = batch_size or recipe.step_images
    views = Views(images, config, training=False, recipe=recipe, seed=0)
    share, room = share or ProcessShare(), _Room(batch_size, config)
    if isinstance(images.reader, StreamReader):  # one worker reads it from front to back
        number = _num_workers(recipe, images, room, at_most=1)
        one_pass = _OnePass(views, images.reader, batch_size, share)
        return Loader(one_pass, batch_size=None, **_loader_options(number))
    keys = [(position, 0) for position in range(len(images))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    room = _Room(min(batch_size, len(keys)), config)
    number = _num_workers(recipe, images, room, at_most=len(batches))
    batches = batches[share.process :: share.num_processes]
    return Loader(views, batch_sampler=batches, collate_fn=collate, **_loader_options(number))


class _OnePass(IterableDataset[Batch]):
    """Batches of every image of a stream, in order; of P processes, each takes every P-th batch."""

    def __init__(self, views: Views, reader: StreamReader, batch_size: int, share: ProcessShare) -> None:
        self.views, self.reader, self.batch_size, self.share = views, reader, batch_size, share

    def __iter__(self) -> Iterator[Batch]:
        samples = self.reader.one_pass()
        for number in itertools.count():
            batch = list(itertools.islice(samples, self.batch_size))
            if not batch:
                return
            if number % self.share.num_processes == self.share.process:
                yield collate([self._view(sample) for sample in batch])

    def _view(self, sample: ShardSample) -> View:
        try:
            return View(self.views.view(self.reader.decode(sample), 0), self.reader.label_of(sample), ())
        except UNREADABLE as error:
            return View(None, -1, (f"{sample.where}: {error}",))


class _Room(NamedTuple):
    """The shared memory that loading takes.

    Attributes:
        num_images: images per batch.
        config: timm's data config.
        held: number of batches that the main process holds at once, while it loads more.
    """

    num_images: int
    config: Mapping[str, Any]
    held: int = 2

    @property
    def image_bytes(self) -> int:
        """Size of an image."""
        pixels: int = math.prod(self.config["input_size"])
        return pixels * torch.float32.itemsize


def _num_workers(recipe: DataRecipe, images: ImageSet, room: _Room, *, at_most: int | None = None) -> int:
    """Return the number of workers that have something to do, and room for it.

    Args:
        recipe: number of workers to use.
        images: images to load.
        room: what they take.
        at_most: number of workers that have something to do; None for any number.
    """
    number = recipe.num_workers if isinstance(recipe.num_workers, int) else default_num_workers()
    number = number if at_most is None else min(number, at_most)
    number = fitting_workers(number, room.num_images, room.image_bytes, room.held)
    if isinstance(images.reader, StreamReader):  # workers and lanes are powers of two, so that no shard is read twice
        number = next(n for n in range(min(number, images.reader.num_lanes), -1, -1) if n == 0 or n & (n - 1) == 0)
    return number


def _loader_options(num_workers: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers, "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # otherwise each pass draws from the global generator
    }  # fmt: skip


def default_num_workers() -> int:
    """Return the number of workers for --num-workers auto: one less than the cores, 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, min(_MAX_WORKERS, cores // local_processes() - 1))


def collate(views: Sequence[View]) -> Batch:
    """Stack views to a batch, and collect the unreadable images."""
    good = [(view.view, view.label) for view in views if view.view is not None]
    images = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0)
    bad = tuple(message for view in views for message in view.bad)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), bad)


def count_unreadable(batch: Batch, *, skip: bool) -> int:
    """Return the number of unreadable images of a batch.

    Args:
        batch: a batch from a loader.
        skip: whether unreadable images are allowed (--skip-bad-images).

    Raises:
        DataError: there are unreadable images, and `skip` is False.
    """
    if batch.bad and not skip:
        raise DataError(f"Unreadable image: {batch.bad[0]}", hint="Give --skip-bad-images to skip such images.")
    return len(batch.bad)
