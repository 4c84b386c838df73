"""Malicious and damaged images count as unreadable, at little cost of time and memory."""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from tests.data.opened import GREY, RGB, folder_set
from vitcompress.data.readers import FileReader
from vitcompress.data.views import Views
from vitcompress.recipe import DataRecipe

KINDS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")
NOISE = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    found = io.BytesIO()
    image.save(found, kind, **how)
    return found.getvalue()


def view(path: Path, content: bytes, config: dict[str, Any] = RGB, *, training: bool = False) -> object:
    """Write an image file and return its view, or why it is unreadable."""
    path.write_bytes(content)
    views = Views(folder_set(path.parent), config, training=training, recipe=DataRecipe(), seed=0)
    found = views[0, 0]
    return found.bad[0] if found.view is None else found.view


def png(width: int, height: int) -> bytes:
    """Make a small PNG file that claims a size and ends early."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", size), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def text_bomb() -> bytes:
    """A PNG of one pixel with a compressed comment of 200 MB."""
    whole = encoded(Image.new("RGB", (1, 1)), "PNG")
    data = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return whole[:33] + chunk + whole[33:]


def cut_by_half(kind: str) -> bytes:
    whole = encoded(Image.fromarray(NOISE), kind)
    return whole[: len(whole) // 2]


BAD: dict[str, Callable[[], bytes]] = {
    "zero-bytes": lambda: b"",
    "text": lambda: b"this is not an image\n" * 20,
    "a web page": lambda: b"<!DOCTYPE html><html>404</html>",
    "an archive": lambda: b"PK\x03\x04" + bytes(100),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n",
    "a bomb": lambda: png(60_000, 60_000),
    "beyond a bomb": lambda: png(2**31 - 1, 2**31 - 1),
    "a bomb of text": text_bomb,
    "a hair": lambda: encoded(Image.new("RGB", (1, 1_000_000)), "PNG"),
    **{f"{kind} cut by half": partial(cut_by_half, kind) for kind in KINDS},
}


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_not_waited_on(tmp_path: Path) -> None:
    encoded_image = encoded(Image.fromarray(NOISE), "PNG")
    (tmp_path / "b.png").write_bytes(encoded_image)
    os.mkfifo(tmp_path / "a.png")
    reader = FileReader((str(tmp_path / "a.png"), str(tmp_path / "b.png")))
    with pytest.raises(OSError, match="not a regular file"):
        reader.open(0)
    assert reader.open(1).size == (20, 24)


def test_a_narrow_image_is_seen_where_it_fills_no_memory(tmp_path: Path) -> None:
    found = view(tmp_path / "a.png", encoded(Image.new("RGB", (1, 1000)), "PNG"))
    assert isinstance(found, torch.Tensor)
    found = view(tmp_path / "a.png", encoded(Image.new("RGB", (1, 100_000)), "PNG"), training=True)
    assert isinstance(found, torch.Tensor)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_in_little_time_and_memory(kind: str, tmp_path: Path) -> None:
    content = BAD[kind]()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = view(tmp_path / "a.jpg", content)
    assert isinstance(found, str)
    assert str(tmp_path / "a.jpg") in found
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # kB


def test_postscript_with_an_images_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands it to Ghostscript, where that is installed."""
    whole = encoded(Image.fromarray(NOISE), "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("it was run"))
    found = view(tmp_path / "a.jpg", whole)
    assert isinstance(found, str)
    assert "cannot identify" in found


FORMS: dict[str, tuple[Callable[[], bytes], float]] = {
    "CMYK JPEG": (lambda: encoded(Image.new("RGB", (20, 20), (90, 90, 90)).convert("CMYK"), "JPEG"), 90),
    "16 bits": (lambda: encoded(Image.fromarray(np.full((20, 20), 90 * 257, np.uint16)), "PNG"), 90),
    "palette with transparent colour": (
        lambda: encoded(Image.new("L", (20, 20), 90).convert("P"), "PNG", transparency=3), 90,
    ),
    "palette with transparent colours": (
        lambda: encoded(Image.new("L", (20, 20), 90).convert("P"), "PNG", transparency=bytes(range(256))), 90,
    ),
    "animated GIF": (
        lambda: encoded(
            Image.new("L", (20, 20), 90), "GIF", save_all=True, append_images=[Image.new("L", (20, 20), 250)] * 3
        ), 90,
    ),
    "animated WEBP": (
        lambda: encoded(
            Image.new("RGB", (20, 20), (90,) * 3), "WEBP", save_all=True, lossless=True,
            append_images=[Image.new("RGB", (20, 20), (250,) * 3)],
        ), 90,
    ),
    "animated PNG": (
        lambda: encoded(
            Image.new("RGB", (20, 20), (90,) * 3), "PNG", save_all=True,
            append_images=[Image.new("RGB", (20, 20), (250,) * 3)],
        ), 90,
    ),
    "one bit": (lambda: encoded(Image.new("1", (20, 20), 1), "PNG"), 255),
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), (90,) * 3), "PNG"), 90),
    "one row": (lambda: encoded(Image.new("RGB", (900, 1), (90,) * 3), "PNG"), 90),
    "floating": (lambda: encoded(Image.fromarray(np.full((20, 20), 90, np.float32)), "TIFF"), 90),
}  # fmt: skip


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb-model", "grey-model"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_unusual_image_is_seen_as_a_viewer_shows_it(
    form: str, training: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    make, value = FORMS[form]
    found = view(tmp_path / "a.png", make(), config, training=training)
    assert isinstance(found, torch.Tensor), found
    assert found.shape == config["input_size"]
    torch.testing.assert_close(found * 0.5 + 0.5, torch.full_like(found, value / 255), atol=0.03, rtol=0)


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_changed_anywhere_never_do_more_than_spoil_the_image(kind: str, tmp_path: Path) -> None:
    whole = encoded(Image.fromarray(NOISE), kind)
    draw = random.Random(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(120):
            harmed = bytearray(whole)
            for _ in range(draw.randrange(1, 8)):
                at = draw.randrange(len(harmed))
                harmed[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(4))
            found = view(tmp_path / "a.jpg", bytes(harmed))
            assert isinstance(found, torch.Tensor) or str(tmp_path / "a.jpg") in str(found)
