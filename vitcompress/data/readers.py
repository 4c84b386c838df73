"""How is one image of a set opened?  From its file, from memory, or from wherever else a reader knows it to be."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

# whatever a file is called, it is decoded in this process: Pillow would run Ghostscript for PostScript
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class Reader(Protocol):
    """A sequence of images that can be opened by number; it can be pickled, for worker processes."""

    def __len__(self) -> int: ...
    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`; where neither side needs more than `at_least` pixels (0: all), perhaps smaller."""

    def where(self, index: int) -> str:
        """What to call image `index` in a message."""


@dataclass(frozen=True)
class FileReader:
    """Images in files."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`.

        Raises:
            OSError: it cannot be, or is a pipe or a device, which would be waited on.
        """
        if not os.path.isfile(self.paths[index]):
            raise OSError("it is no regular file")
        return decoded(self.paths[index], at_least)

    def where(self, index: int) -> str:
        """Its path."""
        return self.paths[index]


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory: `[N, H, W]` uint8, one channel."""

    images: np.ndarray[Any, Any]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Wrap image `index`."""
        return Image.fromarray(self.images[index])

    def where(self, index: int) -> str:
        """The array's name and the image's number."""
        return f"{self.name}[{index}]"


def decoded(image: Path | str | bytes, at_least: int = 0) -> Image.Image:
    """Decode an image.

    Args:
        image: where it lies, or what is in its file.
        at_least: pixels that both sides shall have left; of a JPEG of twice as many or more, the decoder then makes a
            half, a quarter or an eighth, which takes a fraction of the time. 0 for all there are.
    """
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as found:
        if at_least:
            found.draft(found.mode, (at_least, at_least))  # does nothing to other formats
        found.load()
        return found
