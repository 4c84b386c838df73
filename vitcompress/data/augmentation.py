"""timm's training transform: random crops, flips and augmentation, decided by a seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from vitcompress.errors import RecipeError
from vitcompress.recipe import DataRecipe


def training_transform(config: Mapping[str, Any], recipe: DataRecipe) -> Any:
    """Return timm's training transform.

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
    for step in transform.transforms:
        for op in (*getattr(step, "ops", ()), *itertools.chain(*getattr(step, "policy", ()))):
            if op.aug_fn is auto_augment.posterize:
                op.aug_fn = _posterize
    return transform


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
