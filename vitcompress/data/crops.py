"""Endless random crops of a few built-in photographs, to train on without images.

A student that only imitates its teacher does not need images of the classes: it learns well from
crops of a photograph with many details.

Source: Asano and Saeed 2023, arXiv:2112.00725, distillation from a single image; with crops of any
size and place, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vitcompress.bundled import PHOTOGRAPHS
from vitcompress.data.readers import decode
from vitcompress.data.sets import RawImageSet

NUM_CROPS = 100_000  # different crops; each is augmented anew in every pass
NUM_VAL_CROPS = 256
MIN_SIDE = 128  # shortest side of a crop in pixels, before it is stretched
MAX_ASPECT = 4 / 3  # largest ratio of its sides
_HELD_OUT_SEED = 1


@dataclass(frozen=True)
class CropReader:
    """Crops of photographs, of random places and sizes.

    Attributes:
        photographs: paths of the photographs.
        count: number of crops.
        seed: decides all crops.
    """

    photographs: tuple[Path, ...]
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Return crop `index`, with a side between 128 pixels and the photograph's shorter side.

        The logarithm of the side is uniformly distributed.
        """
        draw = np.random.default_rng([self.seed, index])
        photograph = _photograph(self.photographs[int(draw.integers(len(self.photographs)))])
        width, height = photograph.size
        side = math.exp(draw.uniform(math.log(MIN_SIDE), math.log(min(width, height))))
        stretch = math.exp(draw.uniform(-1, 1) * math.log(MAX_ASPECT) / 2)
        across, down = min(width, round(side * stretch)), min(height, round(side / stretch))
        left, top = int(draw.integers(width - across + 1)), int(draw.integers(height - down + 1))
        return photograph.crop((left, top, left + across, top + down))

    def where(self, index: int) -> str:
        """Return the number of the crop."""
        return f"crop {index} of the built-in photographs"


@lru_cache(maxsize=16)
def _photograph(path: Path) -> Image.Image:
    """Decode a photograph, once per process."""
    return decode(path).convert("RGB")


def open_crops(split: str) -> RawImageSet:
    """Return crops of the training photographs, or of the photograph that is held out.

    Args:
        split: "train" or "val".
    """
    paths = tuple(photograph.path for photograph in PHOTOGRAPHS if photograph.held_out is (split == "val"))
    if split == "val":
        name = f"{NUM_VAL_CROPS} crops of a built-in photograph that was not trained on"
        reader = CropReader(paths, NUM_VAL_CROPS, _HELD_OUT_SEED)
    else:
        name = f"crops of {len(paths)} built-in photographs"
        reader = CropReader(paths, NUM_CROPS, 0)
    return RawImageSet(name, reader, notes=(NOTE,), endless=True)


NOTE = (
    "Crops of a few built-in photographs stand in for images. This is a fallback: on them, only agreement with the "
    "teacher is measured, not accuracy. Images of the kind that the model is for give better results: --data DIR."
)
