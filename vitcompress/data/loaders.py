"""Loaders: batches of views, in an order that the seed alone decides."""

from __future__ import annotations

import itertools
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
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.console import local_processes
from vitcompress.runtime.processes import outlive_signals

T = TypeVar("T")
Key = tuple[int, int]  # position in the set, number of the draw
_MOST_WORKERS = 16


class Batch(NamedTuple):
    """Images as the model takes them; a tuple, so that accelerate can move it to a device.

    Attributes:
        images: `[B, C, H, W]`.
        labels: `[B]` int64; -1 where there is no label.
        bad: images that could not be read, and why; not in `images`.
    """

    images: Tensor
    labels: Tensor
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """Which part of every step's images is this process's.

    Attributes:
        process: its number.
        num_processes: how many there are.
        accumulate: batches that it takes its part in.
    """

    process: int = 0
    num_processes: int = 1
    accumulate: int = 1

    def cut(self, keys: Sequence[T]) -> Iterator[Sequence[T]]:
        """Cut a step's images down to the batches of the process.

        Mixing pairs the first image of a batch with its last, the second with the last but one, and so on: where a
        part has an even number of images, whole pairs go into it, so that the pairs are those of the whole batch.
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


def share_of(accelerator: Accelerator, *, accumulate: int = 1) -> Share:
    """The share of the process that asks."""
    return Share(accelerator.process_index, accelerator.num_processes, accumulate)


class Stream(Sampler[list[Key]]):
    """Batches of `(position, draw)`: shuffled passes over the images, end to end, so every batch is full.

    Args:
        num_images: N; None for a stream, which has an order of its own and is taken as it comes.
        batch_size: images per step.
        seed: decides the order; each pass has its own.
        num_steps: where it ends; endless where None.
        repeats: draws of an image that follow each other; as many passes then take as many times the steps.
        start: the first step.
        share: this process's part of each step.

    Source: of repeats, Hoffer et al. 2019, arXiv:1901.09335; the order is that of timm's RepeatAugSampler.
    """

    def __init__(
        self, num_images: int | None, batch_size: int, *, seed: int, num_steps: int | None, repeats: int = 1,
        start: int = 0, share: Share | None = None,
    ) -> None:  # fmt: skip
        self.num_images, self.batch_size, self.seed, self.num_steps = num_images, batch_size, seed, num_steps
        self.repeats, self.start, self.share = repeats, start, share or Share()

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
        number, before = divmod(first, self.num_images * self.repeats)
        for each in itertools.count(number):
            order = np.random.default_rng([self.seed, each]).permutation(self.num_images).repeat(self.repeats)
            for position in order[before:].tolist():
                yield position, next(draw)
            before = 0


def training_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, *, seed: int, num_steps: int | None,
    start: int = 0, share: Share | None = None,
) -> DataLoader[Any]:  # fmt: skip
    """Random views in shuffled batches, `recipe.batch_size` images a step: till `num_steps`, or endless.

    Args:
        images: what to train on.
        config: timm's data config.
        recipe: batch size, workers and augmentation.
        seed: decides order and views.
        num_steps: None for an endless loader.
        start: the first step.
        share: this process's part of each step.
    """
    if isinstance(images.reader, StreamReader):  # a batch comes from one lane
        block = max(1, recipe.batch_size // recipe.repeats)
        images = images.streamed(replace(images.reader, seed=seed, block=block))
    views = Views(images, config, training=True, recipe=recipe, seed=seed)
    count = None if images.streams else len(images)
    stream = Stream(
        count, recipe.batch_size, seed=seed, num_steps=num_steps, repeats=recipe.repeats, start=start, share=share
    )
    return DataLoader(views, batch_sampler=stream, collate_fn=collate, **_loading(recipe, images))


def evaluation_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, share: Share | None = None,
    batch_size: int | None = None,
) -> DataLoader[Any]:  # fmt: skip
    """Centre crops in order, every image once.

    Args:
        images: what to evaluate on.
        config: timm's data config.
        recipe: batch size and workers.
        share: of several processes, each takes every so many batches.
        batch_size: images of a batch; those of a training step by default.
    """
    batch_size = batch_size or recipe.batch_size
    views = Views(images, config, training=False, recipe=recipe, seed=0)
    workers, share = _loading(recipe, images), share or Share()
    if isinstance(images.reader, StreamReader):  # from front to back, so by one worker
        workers["num_workers"] = min(1, workers["num_workers"])
        return DataLoader(_OnePass(views, images.reader, batch_size, share), batch_size=None, **workers)
    keys = [(position, 0) for position in range(len(images))]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    workers["num_workers"] = min(len(batches), workers["num_workers"])
    mine = batches[share.process :: share.num_processes]
    return DataLoader(views, batch_sampler=mine, collate_fn=collate, **workers)


class _OnePass(IterableDataset[Batch]):
    """Batches of every image of a stream, in order; of several processes, each takes every so many."""

    def __init__(self, views: Views, reader: StreamReader, batch_size: int, share: Share) -> None:
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
            return View(self.views.view(self.reader.decoded(sample), 0), self.reader.label_of(sample), ())
        except UNREADABLE as error:
            return View(None, -1, (f"{sample.where}: {error}",))


def _loading(recipe: DataRecipe, images: ImageSet) -> dict[str, Any]:
    """How a loader loads: each worker decodes and augments on one thread, and has two batches under way."""
    number = recipe.num_workers if isinstance(recipe.num_workers, int) else spare_cores()
    if isinstance(images.reader, StreamReader):  # more workers than lanes would read the same shards
        number = next(n for n in range(min(number, images.reader.num_lanes), -1, -1) if n == 0 or n & (n - 1) == 0)
    return {
        "num_workers": number, "persistent_workers": False, "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # or each pass would take one of the student's random numbers
        "worker_init_fn": outlive_signals,
    }  # fmt: skip


def spare_cores() -> int:
    """Cores that this process may have for workers: all that it may run on but one, at most 16, and at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return max(1, min(_MOST_WORKERS, cores // local_processes() - 1))


def collate(samples: Sequence[View]) -> Batch:
    """Stack views; names of unreadable images are kept apart."""
    good = [(sample.view, sample.label) for sample in samples if sample.view is not None]
    images = torch.stack([view for view, _ in good]) if good else torch.empty(0)
    bad = tuple(name for sample in samples for name in sample.bad)
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.int64), bad)


def check_readable(batch: Batch, *, skip: bool) -> int:
    """Count the unreadable images of a batch.

    Args:
        batch: as loaded.
        skip: whether the user asked to go on without them.

    Raises:
        DataError: there are some, and they are not to be skipped.
    """
    if batch.bad and not skip:
        raise DataError(f"Unreadable image: {batch.bad[0]}", hint="--skip-bad-images goes on without such images.")
    return len(batch.bad)
