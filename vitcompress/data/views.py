"""Views of images, as tensors: random crops for training, otherwise as the data config says."""

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

from vitcompress.data.augmentation import seeded, training_transform
from vitcompress.data.preprocessing import resized_size
from vitcompress.data.sets import ImageSet
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe

_MODES = {1: "L", 3: "RGB"}
_MAX_ATTEMPTS = 100  # unreadable images in a row, before a training view is given up
_MIN_ASPECT = math.sqrt(3 / 4)  # shortest side of a random crop, relative to a square of the same area
_MAX_PIXELS = 64_000_000  # of an image after its shorter side was enlarged
UNREADABLE = (  # errors that Pillow raises for broken images
    OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, struct.error, UnidentifiedImageError,
    Image.DecompressionBombError,
)  # fmt: skip


class View(NamedTuple):
    """A view of an image.

    Attributes:
        view: pixels `[C, H, W]`; None if no image could be read.
        label: class index; -1 if there is none.
        bad: unreadable images in place of which this one was read, and why they are unreadable.
    """

    view: Tensor | None
    label: int
    bad: tuple[str, ...]


class Views(Dataset[View]):
    """Views of the images of a set: `views[position, draw]`, each drawn from a seed of its own.

    So the views are the same for any number of workers.

    Args:
        images: the images.
        config: timm's data config.
        training: random crops and augmentation; otherwise the whole image, or its center.
        recipe: options of the augmentation.
        seed: with `draw`, decides the view.

    Raises:
        DataError: the model takes neither 1 nor 3 channels.
        RecipeError: --auto-augment is not a timm policy.
    """

    def __init__(
        self, images: ImageSet, config: Mapping[str, Any], *, training: bool, recipe: DataRecipe, seed: int
    ) -> None:
        self.images, self.training, self.seed = images, training, seed
        channels = config["input_size"][0]
        if channels not in _MODES:
            raise DataError(f"The model takes {channels} channels, but images have 1 or 3.")
        self.mode = _MODES[channels]
        self.transform = (
            training_transform(config, recipe) if training else create_transform(**config, is_training=False)
        )
        # a training view is a crop that is scaled down, so JPEGs are decoded just large enough
        size = max(config["input_size"][1:])
        self.grows = not training and config.get("crop_mode", "center") == "center"
        self.resized_side = max(resized_size(config))
        self.min_side = math.ceil(size / (math.sqrt(recipe.crop_min) * _MIN_ASPECT)) if training else 0

    def __getitem__(self, key: tuple[int, int]) -> View:
        """Return a view; while training, of the next readable image if this one is not readable."""
        position, draw = key
        bad: list[str] = []
        for offset in range(_MAX_ATTEMPTS if self.training else 1):
            index = self._index(position + offset)
            try:
                image = self.images.reader.open(index, self.min_side)
                return View(self.view(image, draw), self.images.label(index), tuple(bad))
            except UNREADABLE as error:
                bad.append(f"{self.images.reader.where(index)}: {error}")
        return View(None, -1, tuple(bad))

    def _index(self, position: int) -> int:
        return position if self.images.streams else self.images.indices[position % len(self.images)]

    def view(self, image: Image.Image, draw: int) -> Tensor:
        """Return the view `draw` of an image."""
        self._check_sides(image)
        converted = _convert(image, self.mode)
        with seeded(self.seed, draw):
            view: Tensor = self.transform(converted)
        return view

    def _check_sides(self, image: Image.Image) -> None:
        """Refuse an image so narrow that resizing it for the center crop would fill the memory.

        Raises:
            ValueError: the image is too narrow.
        """
        short, long = sorted(image.size)
        if self.grows and short < self.resized_side and self.resized_side**2 * long > _MAX_PIXELS * short:
            raise ValueError(f"its sides are {short:,} and {long:,} pixels: too narrow to be enlarged")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `L` or `RGB`, as an image viewer shows it."""
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
