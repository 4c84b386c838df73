"""timm's random crops, flips and augmentation of images, and mixup and CutMix of batches.

A seed decides every random choice.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from vitcompress.errors import RecipeError
from vitcompress.recipe import DataRecipe

_MIXING_STREAM = 1  # separates the random numbers of mixing from those of the views


def training_transform(config: Mapping[str, Any], recipe: DataRecipe) -> Any:
    """Return timm's training transform.

    Where evaluation squashes images (`crop_mode`), so does training: timm's range of shapes is
    relative to the shape of the image.

    Args:
        config: timm's data config.
        recipe: options of crops, flips and augmentation.

    Raises:
        RecipeError: --auto-augment is not a timm policy.
    """
    try:
        transform = create_transform(
            **config, is_training=True, scale=(recipe.crop_min, 1.0), hflip=recipe.hflip, color_jitter=None,
            auto_augment=recipe.auto_augment, re_prob=recipe.erase, re_mode="pixel",
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # timm parses with asserts
        raise RecipeError(
            f"--auto-augment {recipe.auto_augment}: timm has no such policy: {error}.",
            hint="For example rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0.",
        ) from error
    if config.get("crop_mode") == "squash":
        transform.transforms[0] = _SquashedCrop(transform.transforms[0])
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


class _SquashedCrop:
    """Random crops that are stretched about as much as the whole image would be.

    Args:
        crop: timm's random crop.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.crop = crop

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a crop, scaled to the input size."""
        crop = copy.copy(self.crop)
        crop.ratio = tuple(ratio * image.width / image.height for ratio in self.crop.ratio)
        cropped: Image.Image = crop(image)
        return cropped


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    """Keep the upper `bits` of each pixel; with 0 bits, return a black image.

    At full magnitude, timm's own operation asks Pillow for 0 bits, which Pillow 13 refuses. With
    rand-m9-mstd0.5, one in a few hundred images would end the training.
    """
    posterized: Image.Image = auto_augment.posterize(image, bits) if bits else image.point(lambda value: 0)
    return posterized


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed all random generators with `numbers`, and restore their states in the end."""
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


class Mixing:
    """Mixes batches, the same way for the same seed and number of the batch.

    Batches are mixed after loading, so that teacher and student get the same mixed views, and so
    that the number of workers changes nothing.

    Args:
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off. With both, each batch gets one of them.
        num_classes: number K of classes of the targets; None for no targets.
        smoothing: label smoothing, 0-1.
        seed: with the number of the batch, decides how it is mixed.

    Source: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; timm's version,
        as in DeiT's training.
    """

    def __init__(
        self, *, mixup: float = 0.0, cutmix: float = 0.0, num_classes: int | None = None, smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.num_classes, self.smoothing, self.seed = num_classes, smoothing, seed
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes or 1) if mixup or cutmix else None
        )

    def __call__(self, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """Mix a batch, its images in place.

        Args:
            images: `[B, C, H, W]`; they are mixed in pairs, so the last of an odd number is
                dropped.
            labels: `[B]`.
            number: number of the batch.

        Returns:
            Images, and targets `[B, K]`, or None without `num_classes`.
        """
        if self.num_classes is None:
            labels = labels.clamp(min=0, max=0)  # timm needs labels
        if self.mix is not None and len(images) > 1:
            even = len(images) // 2 * 2
            with seeded(self.seed, _MIXING_STREAM, number):
                images, targets = self.mix(images[:even], labels[:even])
        else:
            targets = mixup_target(labels, self.num_classes or 1, smoothing=self.smoothing)
        return images, targets if self.num_classes is not None else None
