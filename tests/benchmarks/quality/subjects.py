"""Which models and images are used? All images are decoded once and kept in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcompress.bundled import FASHION_VIT
from vitcompress.data.classes import ModelClasses, known_classes
from vitcompress.data.loaders import Batch, ShuffledBatches, collate
from vitcompress.data.open import open_sets
from vitcompress.data.sets import ImageSet, hold_out
from vitcompress.data.views import Views
from vitcompress.pipeline.checks import bundle_of
from vitcompress.pretrained.data_config import data_config
from vitcompress.pretrained.load import load_pretrained
from vitcompress.pretrained.resolve import resolve
from vitcompress.recipe import DataRecipe, ModelRecipe

SHARED = Path(__file__).parents[4] / "shared" / "data"
NUM_CALIBRATION = 256


@dataclass(frozen=True)
class Subject:
    """A model to compress, and how each method trains on it.

    Attributes:
        model: as the product's command line names it.
        ratios: sizes aimed at, the teacher's over the student's parameters; `smallest` shares all
            blocks.
        learning_rates: each method has the best of them.
        full_steps: of the full form.
        fast_steps: of the fast form.
        batch_size: images per step.
        crop_min: smallest share of an image that a training crop keeps.
        checkpoint: weights; None where they are built in.
        data: folder of images; None where they are built in.
        ours: training options that the product brings for this model.
        precision: of training, as accelerate names it; starts are made and models measured in
            single precision.
    """

    model: str
    ratios: tuple[str, ...]
    learning_rates: tuple[float, ...]
    full_steps: int
    fast_steps: int
    batch_size: int
    crop_min: float = DataRecipe().crop_min
    checkpoint: Path | None = None
    data: Path | None = None
    ours: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "no"

    def missing(self) -> Path | None:
        """What it needs and is not there."""
        needed = (path for path in (self.checkpoint, self.data) if path is not None)
        return next((path for path in needed if not path.exists()), None)


SUBJECTS: Mapping[str, Subject] = {
    "fashion_vit": Subject(
        "fashion_vit", ("2", "3", "5", "smallest"), (1e-4, 5e-4, 2e-3), full_steps=700, fast_steps=40, batch_size=64,
        crop_min=FASHION_VIT.recipe["data"]["crop_min"],
        ours={name: FASHION_VIT.recipe["distill"][name] for name in ("optimizer", "fade")},
    ),
    "deit_tiny": Subject(
        "deit_tiny", ("2", "4"), (5e-5, 2e-4, 1e-3), full_steps=300, fast_steps=100, batch_size=16,
        checkpoint=SHARED / "deit_tiny.safetensors", data=SHARED / "imagenet-compatible",
        precision="bf16",  # half the time on a CPU that has it
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """Images `[N, C, H, W]` as the model takes them, labels `[N]` and teacher's logits `[N, K]`."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor


@dataclass(frozen=True)
class Sets:
    """What there is to train and to measure on.

    Attributes:
        pixels: training images, uint8, `[N, C, S, S]`, a little larger than the model's.
        labels: of them, `[N]`.
        held_out: training images that are not trained on, to choose learning rates by.
        test: to report.
        calibration: training images, to start from.
        config: timm's data config.
        crop_min: smallest share of an image that a training crop keeps.
    """

    pixels: Tensor
    labels: Tensor
    held_out: Labelled
    test: Labelled
    calibration: Tensor
    config: Mapping[str, Any]
    crop_min: float

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.config["input_size"]
        return channels, height, width


def load(subject: Subject) -> tuple[nn.Module, Sets]:
    """The teacher of a subject, and its images."""
    named = ModelRecipe(subject.model, subject.checkpoint)
    source = resolve(named)
    teacher = load_pretrained(source)
    config, num_classes = data_config(teacher, named), int(teacher.num_classes)  # type: ignore[arg-type]
    images, test = open_sets(
        DataRecipe(data=str(subject.data) if subject.data else None), bundle=bundle_of(source.name),
        model=ModelClasses(num_classes, known_classes((), source.pretrained_cfg, num_classes)), seed=0,
    )  # fmt: skip
    assert images is not None
    assert test is not None
    kept, held_out = hold_out(images, seed=0)
    side = round(config["input_size"][-1] / config["crop_pct"])
    uncropped, labels = read(kept, {**config, "input_size": (config["input_size"][0], side, side), "crop_pct": 1.0})
    mean, std = _normalisation(config)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:NUM_CALIBRATION]
    return teacher, Sets(
        pixels=((uncropped * std + mean) * 255).round().clamp(0, 255).to(torch.uint8),
        labels=labels,
        held_out=taught(teacher, *read(held_out, config)),
        test=taught(teacher, *read(test, config)),
        calibration=read(kept.subset(order.tolist(), "calibration"), config)[0],
        config=config,
        crop_min=subject.crop_min,
    )


def read(images: ImageSet, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Every image of a set as the product evaluates on it, and the labels."""
    views = Views(images, config, training=False, recipe=DataRecipe(), seed=0)
    found = [views[position, 0] for position in range(len(images))]
    batch = collate(found)
    if batch.bad:
        raise OSError(batch.bad[0])
    return batch.images, batch.labels


def taught(teacher: nn.Module, images: Tensor, labels: Tensor) -> Labelled:
    """Images with their labels and what the teacher says of them."""
    return Labelled(images, labels, logits_of(teacher, images))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `[N, K]` of images `[N, C, H, W]`, in parts that fit a cache."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(part).float() for part in images.split(50)])


@dataclass(frozen=True)
class Batches:
    """Batches of random views, the same for the same seed; stands in for a data loader.

    Crops and mirrors are drawn as the product draws them, but for a whole batch at once and from
    decoded pixels.
    """

    sets: Sets
    batch_size: int
    seed: int
    num_steps: int

    def __iter__(self) -> Iterator[Batch]:
        order = ShuffledBatches(len(self.sets.pixels), self.batch_size, seed=self.seed, num_steps=self.num_steps)
        for number, keys in enumerate(order):
            chosen = torch.tensor([position for position, _ in keys])
            generator = torch.Generator().manual_seed(1_000_000 * self.seed + number)
            yield Batch(draw_views(self.sets, chosen, generator), self.sets.labels[chosen], ())


def draw_views(sets: Sets, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of some training images, half of them mirrored, `[B, C, H, W]`.

    Args:
        sets: holds the pixels.
        chosen: which, `[B]`.
        generator: decides crops and mirrors.
    """
    mean, std = _normalisation(sets.config)
    area, shape, across, down, side = torch.rand(5, len(chosen), generator=generator)
    area = sets.crop_min + (1 - sets.crop_min) * area
    aspect = torch.exp((2 * shape - 1) * math.log(4 / 3))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirrored = torch.where(side < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(area)
    theta = torch.stack([
        torch.stack([width * mirrored, zero, (2 * across - 1) * (1 - width)], 1),
        torch.stack([zero, height, (2 * down - 1) * (1 - height)], 1),
    ], 1)  # fmt: skip
    grid = F.affine_grid(theta, [len(chosen), *sets.input_size], align_corners=False)
    pixels = sets.pixels[chosen].float() / 255
    views = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return (views.clamp(0, 1) - mean) / std


def _normalisation(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.tensor(config["mean"]).view(-1, 1, 1), torch.tensor(config["std"]).view(-1, 1, 1)
