"""Readers: open one image of a set by its number, from a file or from memory."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, features

# formats that Pillow decodes itself, whatever the file is called; for PostScript it would run
# Ghostscript
_EXTENSIONS = {
    "AVIF": ".avif", "BMP": ".bmp", "GIF": ".gif", "JPEG": ".jfif .jpe .jpeg .jpg", "JPEG2000": ".j2k .jp2",
    "PNG": ".png", "PPM": ".pbm .pgm .pnm .ppm", "TIFF": ".tif .tiff", "WEBP": ".webp",
}  # fmt: skip
FORMATS = tuple(name for name in _EXTENSIONS if name != "AVIF" or features.check("avif"))
EXTENSIONS = frozenset(extension for name in FORMATS for extension in _EXTENSIONS[name].split())


class Reader(Protocol):
    """A sequence of images, opened by number; it can be pickled for worker processes."""

    def __len__(self) -> int: ...
    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`, possibly smaller, but with sides of at least `at_least` pixels.

        0 means full size.
        """

    def where(self, index: int) -> str:
        """Name image `index` in a message."""


@dataclass(frozen=True)
class FileReader:
    """Images in files."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int, at_least: int = 0) -> Image.Image:
        """Decode image `index`.

        Raises:
            OSError: the file cannot be read, or is a pipe or a device, which could block.
        """
        if not os.path.isfile(self.paths[index]):
            raise OSError("not a regular file")
        return decode(self.paths[index], at_least)

    def where(self, index: int) -> str:
        """Return the path of image `index`."""
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
        """Return the array's name and the image's number."""
        return f"{self.name}[{index}]"


def decode(image: Path | str | bytes, at_least: int = 0) -> Image.Image:
    """Decode an image.

    Args:
        image: its path, or the content of its file.
        at_least: number of pixels that both sides keep; a JPEG that is larger by a factor of two or
            more is decoded at 1/2, 1/4 or 1/8 of its size, which is much faster. 0 means full size.

    Returns:
        The image, in the mode of its file.
    """
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as picture:
        if at_least:
            picture.draft(picture.mode, (at_least, at_least))  # only JPEG does this
        picture.load()
        return picture
