"""What does a model see of an image, and in which order?  Random or centre crops, in batches, each from its own seed.

Each training view is drawn from its own seed, so the stream of views is the same for any number of workers.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from vitcompress.data import ImageSet, Sample, StreamReader
from vitcompress.errors import DataError, RecipeError
from vitcompress.recipe import DataRecipe

_MODES = {1: "L", 3: "RGB"}
_MOST_WORKERS = 16
_NARROWEST = math.sqrt(3 / 4)  # of a random crop: its shorter side, by that of a square of the same area
_UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


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


class Views(Dataset[tuple[Tensor, int] | str]):
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
        self.images, self.seed = images, seed
        channels = config["input_size"][0]
        if channels not in _MODES:
            raise DataError(f"The model takes {channels} channels; images have 1 or 3.")
        self.mode = _MODES[channels]
        self.transform = random_views(config, recipe) if training else create_transform(**config, is_training=False)
        # a training view is a crop, made smaller: no JPEG needs to be decoded larger than that takes
        size = max(config["input_size"][1:])
        self.at_least = math.ceil(size / (math.sqrt(recipe.crop_min) * _NARROWEST)) if training else 0

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        position, draw = key
        index = position if self.images.streams else self.images.indices[position]
        try:
            image = self.images.reader.open(index, self.at_least)
            label = self.images.labels[index] if self.images.labels is not None else -1
            return self.view(image, draw), label
        except _UNREADABLE as error:
            return f"{self.images.reader.where(index)}: {error}"

    def view(self, image: Image.Image, draw: int) -> Tensor:
        """The view of an image that `draw` decides."""
        converted = _convert(image, self.mode)
        with seeded(self.seed, draw):
            view: Tensor = self.transform(converted)
        return view


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


class Stream(Sampler[list[tuple[int, int]]]):
    """Batches of `(position, draw)`: shuffled passes over the images, end to end, so every batch is full.

    Args:
        num_images: N; None for a stream, which has an order of its own and is taken as it comes.
        batch_size: images per batch.
        seed: decides the order; each pass has its own.
        num_steps: batches; endless where None.
        repeats: draws of an image that follow each other; as many passes then take as many times the steps.

    Source: of repeats, Hoffer et al. 2019, arXiv:1901.09335; the order is that of timm's RepeatAugSampler.
    """

    def __init__(
        self, num_images: int | None, batch_size: int, *, seed: int, num_steps: int | None, repeats: int = 1
    ) -> None:
        self.num_images, self.batch_size, self.seed, self.num_steps = num_images, batch_size, seed, num_steps
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = self._draws()
        for _ in itertools.count() if self.num_steps is None else range(self.num_steps):
            yield list(itertools.islice(draws, self.batch_size))

    def _draws(self) -> Iterator[tuple[int, int]]:
        draw = itertools.count()
        for position in self._positions():
            for _ in range(self.repeats):
                yield position, next(draw)

    def _positions(self) -> Iterator[int]:
        if self.num_images is None:
            yield from itertools.count()
            return
        for number in itertools.count():
            yield from np.random.default_rng([self.seed, number]).permutation(self.num_images).tolist()


def training_loader(
    images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe, *, seed: int, num_steps: int | None
) -> DataLoader[Any]:
    """Random views in shuffled batches of `recipe.batch_size`: `num_steps` of them, or endless.

    Args:
        images: what to train on.
        config: timm's data config.
        recipe: batch size, workers and augmentation.
        seed: decides order and views.
        num_steps: None for an endless loader.
    """
    if isinstance(images.reader, StreamReader):  # a batch comes from one lane
        block = max(1, recipe.batch_size // recipe.repeats)
        images = images.streamed(replace(images.reader, seed=seed, block=block))
    views = Views(images, config, training=True, recipe=recipe, seed=seed)
    count = None if images.streams else len(images)
    stream = Stream(count, recipe.batch_size, seed=seed, num_steps=num_steps, repeats=recipe.repeats)
    return DataLoader(views, batch_sampler=stream, collate_fn=collate, **_workers(recipe, images))


def evaluation_loader(images: ImageSet, config: Mapping[str, Any], recipe: DataRecipe) -> DataLoader[Any]:
    """Centre crops in order, every image once.

    Args:
        images: what to evaluate on.
        config: timm's data config.
        recipe: batch size and workers.
    """
    views = Views(images, config, training=False, recipe=recipe, seed=0)
    workers = _workers(recipe, images)
    if isinstance(images.reader, StreamReader):  # from front to back, so by one worker
        workers["num_workers"] = min(1, workers["num_workers"])
        return DataLoader(_OnePass(views, images.reader, recipe.batch_size), batch_size=None, **workers)
    keys = [(position, 0) for position in range(len(images))]
    batches = [keys[i : i + recipe.batch_size] for i in range(0, len(keys), recipe.batch_size)]
    workers["num_workers"] = min(len(batches), workers["num_workers"])
    return DataLoader(views, batch_sampler=batches, collate_fn=collate, **workers)


class _OnePass(IterableDataset[Batch]):
    """Batches of every image of a stream, once and in order."""

    def __init__(self, views: Views, reader: StreamReader, batch_size: int) -> None:
        self.views, self.reader, self.batch_size = views, reader, batch_size

    def __iter__(self) -> Iterator[Batch]:
        samples = self.reader.one_pass()
        while batch := list(itertools.islice(samples, self.batch_size)):
            yield collate([self._view(sample) for sample in batch])

    def _view(self, sample: Sample) -> tuple[Tensor, int] | str:
        try:
            return self.views.view(self.reader.decoded(sample), 0), self.reader.label_of(sample)
        except _UNREADABLE as error:
            return f"{sample.where}: {error}"


def _workers(recipe: DataRecipe, images: ImageSet) -> dict[str, Any]:
    """How a loader loads: each worker decodes and augments on one thread, and has two batches under way."""
    number = recipe.num_workers if isinstance(recipe.num_workers, int) else spare_cores()
    if isinstance(images.reader, StreamReader):  # more workers than lanes would read the same shards
        number = next(n for n in range(min(number, images.reader.num_lanes), -1, -1) if n == 0 or n & (n - 1) == 0)
    return {"num_workers": number, "persistent_workers": False, "pin_memory": torch.cuda.is_available()}


def spare_cores() -> int:
    """Cores that this process may have for workers: all that it may run on but one, at most 16, and at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    siblings = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that torchrun started on this machine
    return max(1, min(_MOST_WORKERS, cores // siblings - 1))


def collate(samples: Sequence[tuple[Tensor, int] | str]) -> Batch:
    """Stack views; names of unreadable images are kept apart."""
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = torch.stack([view for view, _ in good]) if good else torch.empty(0)
    bad = tuple(sample for sample in samples if isinstance(sample, str))
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
