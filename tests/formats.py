"""A few real images, written in each of the formats that `--data` takes."""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import tarfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vitcompress.bundled import PHOTOGRAPHS

CLASSES = ("ape", "bee", "cat", "dog", "eel")


def photographs(count: int, *, side: int = 48) -> list[Image.Image]:
    """Crops of the built-in photographs, each another one."""
    found = []
    for number in range(count):
        photograph = _small(number % len(PHOTOGRAPHS))
        left, top = 20 * number % 200, 15 * number % 150
        found.append(photograph.crop((left, top, left + side, top + side)))
    return found


@lru_cache
def _small(number: int) -> Image.Image:
    with Image.open(PHOTOGRAPHS[number].path) as photograph:
        photograph.draft("RGB", (photograph.width // 4, photograph.height // 4))
        return photograph.convert("RGB")


def jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mode: Any = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(images: Iterable[Image.Image], *, first: int = 0, labels: Iterable[object] = ()) -> list[tuple[str, bytes]]:
    """The members of a shard in WebDataset's layout."""
    numbers = iter(labels)
    members = []
    for number, image in enumerate(images, first):
        members.append((f"{number:06}.jpg", jpeg(image)))
        label = next(numbers, None)
        if label is not None:
            members.append((f"{number:06}.cls", str(label).encode()))
    return members


def write_shards(root: Path, pattern: str, *, shards: int, each: int, num_classes: int = 5) -> Path:
    """`shards` files of `each` images, labelled 0, 1, 2, … in turn."""
    images = photographs(shards * each)
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        labels = [number % num_classes for number in numbers]
        write_shard(
            root / pattern.format(shard), samples([images[n] for n in numbers], first=numbers[0], labels=labels)
        )
    return root


def write_idx(root: Path, *, train: int, test: int) -> Path:
    """Fashion-MNIST's files, as torchvision unpacks them, with grey photographs."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        pixels = b"".join(image.convert("L").resize((28, 28)).tobytes() for image in photographs(count))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        labels = bytes(number % 10 for number in range(count))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return root


def packed(path: Path) -> Path:
    """The same shard, packed."""
    with path.open("rb") as plain, gzip.open(f"{path}.gz", "wb") as file:
        shutil.copyfileobj(plain, file)
    return Path(f"{path}.gz")


def sparse_member(name: str, size: int) -> bytes:
    """Return a tar member of 1 kB that claims `size` bytes, as GNU's sparse files do."""
    info = tarfile.TarInfo(name)
    info.size = 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"A" * 512
