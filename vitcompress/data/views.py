"""Views: what a model sees of an image, as a tensor. A random crop while training, else the centre crop."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from vitcompress.data.augmentation import random_views, seeded
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

_MODES = {1: "L", 3: "RGB"}
_MOST_STAND_INS = 100  # images in a row that cannot be read, till a set is taken for one of no images
_NARROWEST = math.sqrt(3 / 4)  # of a random crop: its shorter side, by that of a square of the same area
_MOST_PIXELS = 64_000_000  # of an image once its shorter side was enlarged
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, struct.error, UnidentifiedImageError,
    Image.DecompressionBombError,
)  # fmt: skip


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
            except UNREADABLE as error:
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
