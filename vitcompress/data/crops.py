"""What is there to learn from where there are no images?  Crops of a few large photographs, without end.

A student that only has to do what its teacher does needs no pictures of the classes: crops of a busy one get it far.

Source: Asano and Saeed 2023, arXiv:2112.00725, distillation from a single image; crops as there, of any size and place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vitcompress.bundled import PHOTOGRAPHS, Photograph
from vitcompress.data.readers import decoded
from vitcompress.data.sets import ImageSet

NUM_CROPS = 100_000  # to choose from; each is augmented anew every time
NUM_VAL_CROPS = 256
SHORTEST, ASPECT = 128, 4 / 3  # pixels of a crop's side; the most that its sides differ
_HELD_OUT_SEED = 1


@dataclass(frozen=True)
class CropReader:
    """Crops of photographs, each at a place and of a size of its own.

    Attributes:
        photographs: to crop.
        count: of crops.
        seed: decides them all.
    """

    photographs: tuple[Path, ...]
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Crop `index`: its side is any from 128 pixels to the photograph's shorter one, small as often as large."""
        draw = np.random.default_rng([self.seed, index])
        photograph = _photograph(self.photographs[int(draw.integers(len(self.photographs)))])
        width, height = photograph.size
        side = math.exp(draw.uniform(math.log(SHORTEST), math.log(min(width, height))))
        stretch = math.exp(draw.uniform(-1, 1) * math.log(ASPECT) / 2)
        across, down = min(width, round(side * stretch)), min(height, round(side / stretch))
        left, top = int(draw.integers(width - across + 1)), int(draw.integers(height - down + 1))
        return photograph.crop((left, top, left + across, top + down))

    def where(self, index: int) -> str:
        """The crop's number."""
        return f"crop {index} of the built-in photographs"


@lru_cache(maxsize=16)
def _photograph(path: Path) -> Image.Image:
    """Decoded once per process: a crop of it then takes no time to speak of."""
    return decoded(path).convert("RGB")


def open_crops(split: str) -> ImageSet:
    """Crops of the photographs for training, or of the one that is held out.

    Args:
        split: "train" or "val".
    """
    chosen: list[Photograph] = [each for each in PHOTOGRAPHS if each.held_out is (split == "val")]
    paths = tuple(each.path for each in chosen)
    if split == "val":
        name = f"{NUM_VAL_CROPS} crops of a built-in photograph that was not trained on"
        reader = CropReader(paths, NUM_VAL_CROPS, _HELD_OUT_SEED)
    else:
        name = f"crops of {len(paths)} built-in photographs"
        reader = CropReader(paths, NUM_CROPS, 0)
    return ImageSet(name, reader, None, tuple(range(len(reader))), note=NOTE, endless=True)


NOTE = (
    "Crops of a few built-in photographs stand in for images. That is a fallback: what is measured on them is "
    "agreement with the teacher, and no accuracy. Images of the kind that the model is for do better: --data DIR."
)
