"""What does a model see of an image, and in which order?  Random or centre crops, in batches, each from its own seed.

Each training view is drawn from its own seed, so the stream of views is the same for any number of workers.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from vitcompress.data.sets import ImageSet
from vitcompress.data.streams import ShardSample, StreamReader
from vitcompress.errors import DataError, RecipeError
from vitcompress.recipe import DataRecipe
from vitcompress.runtime.console import local_processes
from vitcompress.runtime.processes import outlive_signals

T = TypeVar("T")
Key = tuple[int, int]  # position in the set, number of the draw
_MODES = {1: "L", 3: "RGB"}
_MOST_STAND_INS = 100  # images in a row that cannot be read, till a set is taken for one of no images
_MOST_WORKERS = 16
_NARROWEST = math.sqrt(3 / 4)  # of a random crop: its shorter side, by that of a square of the same area
_MOST_PIXELS = 64_000_000  # of an image once its shorter side was enlarged
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, struct.error, UnidentifiedImageError,
    Image.DecompressionBombError,
)  # fmt: skip


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


class View(NamedTuple):
    """A view `[C, H, W]`, or None where there is none; its label; and the images that could not be read before it."""

    view: Tensor | None
    label: int
    bad: tuple[str, ...]


class Views(Dataset[View]):
    """Views of the images of a set: `views[index, draw]`, each drawn from a seed of its own.

    Args:
        images: where the images come from.
        config: timm's data config.
        training: random crops and flips, else the centre crop.
        recipe: how random crops and flips are.
        seed: with `draw`, decides the view.
    """

    def __init__(
        self, images: ImageSet, config: Mapping[str, Any], *, training: bool, recipe: DataRecipe, seed: int
    ) -> None:
        self.images, self.training, self.seed = images, training, seed
        channels = config["input_size"][0]
        if channels not in _MODES:
            raise DataError(f"The model takes {channels} channels; images have 1 or 3.")
        self.mode = _MODES[channels]
        self.transform = random_views(config, recipe) if training else create_transform(**config, is_training=False)
        # a training view is a crop, made smaller: no JPEG needs to be decoded larger than that takes
        size = max(config["input_size"][1:])
        self.shorter = size / config.get("crop_pct", 1.0)
        self.at_least = math.ceil(size / (math.sqrt(recipe.crop_min) * _NARROWEST)) if training else 0

    def __getitem__(self, key: tuple[int, int]) -> View:
        """A view; where its image cannot be read, training goes on with the next one that can."""
        position, draw = key
        bad: list[str] = []
        for offset in range(_MOST_STAND_INS if self.training else 1):
            index = self._index(position + offset)
            try:
                image = self.images.reader.open(index, self.at_least)
                label = self.images.labels[index] if self.images.labels is not None else -1
                return View(self.view(image, draw), label, tuple(bad))
            except _UNREADABLE as error:
                bad.append(f"{self.images.reader.where(index)}: {error}")
        return View(None, -1, tuple(bad))

    def _index(self, position: int) -> int:
        return position if self.images.streams else self.images.indices[position % len(self.images)]

    def view(self, image: Image.Image, draw: int) -> Tensor:
        """The view of an image that `draw` decides."""
        self._check_sides(image)
        converted = _convert(image, self.mode)
        with seeded(self.seed, draw):
            view: Tensor = self.transform(converted)
        return view

    def _check_sides(self, image: Image.Image) -> None:
        """Refuse an image so narrow that enlarging its shorter side, before the centre crop, would fill the memory.

        Raises:
            ValueError: it is.
        """
        short, long = sorted(image.size)
        if not self.training and short < self.shorter and self.shorter**2 * long > _MOST_PIXELS * short:
            raise ValueError(f"its sides are {short:,} and {long:,} pixels: too narrow to be enlarged")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `L` or `RGB`, as a viewer would show it."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def random_views(config: Mapping[str, Any], recipe: DataRecipe) -> Any:
    """Timm's training transform.

    Args:
        config: timm's data config.
        recipe: how random crops and flips are.

    Raises:
        RecipeError: --auto-augment is no policy of timm's.
    """
    try:
        transform = create_transform(
            **config, is_training=True, scale=(recipe.crop_min, 1.0), hflip=recipe.hflip, color_jitter=None,
            auto_augment=recipe.auto_augment, re_prob=recipe.erase, re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # timm asserts what it can read
        raise RecipeError(
            f"--auto-augment {recipe.auto_augment}: timm has no such policy: {error}.",
            hint="For example rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0.",
        ) from error
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the upper `bits` of each pixel; of none, black.

    timm's own asks Pillow for no bits at all at full magnitude, which Pillow 13 refuses: of the images that
    rand-m9-mstd0.5 draws, one in some hundreds would end the training.
    """
    posterized: Image.Image = auto_augment.posterize(image, bits) if bits else image.point(lambda value: 0)
    return posterized


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Run a block on random numbers of its own, decided by `numbers`; leave the global generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


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
        except _UNREADABLE as error:
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
