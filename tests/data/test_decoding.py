"""A photo gives the same pixels through every reader, upright as an image viewer shows it."""

from __future__ import annotations

import gzip
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from tests.data.opened import GREY, RGB
from tests.formats import write_shard
from vitcompress.data.calibration import calibration_batches, draw_images
from vitcompress.data.classes import ModelClasses
from vitcompress.data.loaders import evaluation_loader, training_loader
from vitcompress.data.open import open_to_evaluate
from vitcompress.data.readers import decode, upright
from vitcompress.recipe import DataRecipe

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
PHOTO = Image.fromarray(PIXELS).resize((60, 36), Image.Resampling.BICUBIC)
# what was done to the upright photo, by the orientation that undoes it
UNDONE = {
    1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,), 6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,), 8: (Image.Transpose.ROTATE_270,),
}  # fmt: skip


def turned(orientation: int, kind: str = "PNG", **how: Any) -> bytes:
    """Return the file of the photo as a camera stores it that is held another way."""
    image = PHOTO
    for method in UNDONE[orientation]:
        image = image.transpose(method)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, kind, exif=exif, **how)


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", UNDONE)
def test_every_orientation_is_undone_once(orientation: int, kind: str) -> None:
    image = decode(turned(orientation, kind, **({"lossless": True} if kind == "WEBP" else {})))
    tolerance = 60 if kind == "JPEG" else 0
    difference = np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(PHOTO, np.int16))
    assert image.size == PHOTO.size
    assert difference.max() <= tolerance
    assert np.array_equal(np.asarray(upright(image)), np.asarray(image))


def test_a_reduced_photo_is_upright_too() -> None:
    large = Image.fromarray(PIXELS).resize((1600, 960))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = decode(encoded(large.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif), 100)
    assert image.size == (200, 120)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0damaged", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0"]
)
def test_damaged_exif_leaves_the_pixels_alone(exif: bytes) -> None:
    data = encoded(PHOTO, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(PHOTO))


FORMS: dict[str, Callable[[], bytes]] = {
    "turned": lambda: turned(6),
    "turned jpeg": lambda: turned(8, "JPEG"),
    "mirrored": lambda: turned(5),
    "gray": lambda: encoded(PHOTO.convert("L")),
    "gray with alpha": lambda: encoded(PHOTO.convert("LA")),
    "alpha": lambda: encoded(Image.merge("RGBA", (*PHOTO.split(), PHOTO.convert("L")))),
    "palette": lambda: encoded(PHOTO.convert("P")),
    "palette with a transparent color": lambda: encoded(PHOTO.convert("P"), transparency=3),
    "palette with transparent colors": lambda: encoded(PHOTO.convert("P"), transparency=bytes(range(256))),
    "16 bits": lambda: encoded(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)),
    "cmyk": lambda: encoded(PHOTO.convert("CMYK"), "JPEG"),
    "one bit": lambda: encoded(PHOTO.convert("1")),
}


def as_folder(root: Path, data: bytes) -> str:
    return written(root / "x.jpg", data)


def as_classes(root: Path, data: bytes) -> str:
    written(root / "a" / "x.jpg", data)
    return str(root)


def as_shard(root: Path, data: bytes) -> str:
    write_shard(root / "x.tar", [("0.jpg", data), ("0.cls", b"0")])
    return f"wds:{root}"


def as_stream(root: Path, data: bytes) -> str:
    pytest.importorskip("webdataset", reason="the extra webdataset is not installed")
    shard = write_shard(root / "x.tar", [("0.jpg", data), ("0.cls", b"0")])
    (root / "x.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    shard.unlink()
    return f"wds:{root}"


def as_table(root: Path, data: bytes) -> str:
    hf = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a"])})
    rows = hf.Dataset.from_dict({"image": [{"bytes": data, "path": None}], "label": [0]}, features=features)
    hf.DatasetDict({"train": rows, "validation": rows}).save_to_disk(root / "saved")
    return f"hfds:{root / 'saved'}"


def as_pets(root: Path, data: bytes) -> str:
    written(root / "oxford-iiit-pet" / "images" / "pet_0.jpg", data)
    for split in ("trainval", "test"):
        written(root / "oxford-iiit-pet" / "annotations" / f"{split}.txt", b"pet_0 1 1 1\n")
    return f"torch/oxford_iiit_pet:{root}"


def written(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path.parent)


PLACES = (as_folder, as_classes, as_shard, as_stream, as_table, as_pets)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache of `datasets` in the test's folder, and the Hub offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        config = importlib.import_module("datasets.config")
    except ImportError:
        return
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def views_of(place: str, config: dict[str, Any]) -> list[Tensor]:
    """Return the photo as it is evaluated, calibrated on and trained on."""
    images = open_to_evaluate(place, "--data", DataRecipe(), None, ModelClasses(1))
    recipe = DataRecipe(batch_size=1, num_workers=0)
    evaluated = next(iter(evaluation_loader(images, config, recipe))).images
    calibrated = next(iter(calibration_batches(draw_images(images, 1, seed=0), config, recipe)))
    trained = next(iter(training_loader(images, config, recipe, seed=0, num_steps=1))).images
    return [evaluated, calibrated, trained]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES[1:], ids=lambda place: place.__name__)
def test_every_reader_gives_the_pixels_of_a_folder(
    place: Callable[[Path, bytes], str], form: str, tmp_path: Path
) -> None:
    data = FORMS[form]()
    for config in (RGB, GREY):
        expected = views_of(as_folder(tmp_path / "flat", data), config)
        for ours, theirs in zip(views_of(place(tmp_path / "other", data), config), expected, strict=True):
            assert torch.equal(ours, theirs)
    plain = views_of(as_folder(tmp_path / "upright", encoded(PHOTO)), RGB)
    if form in ("turned", "mirrored"):
        seen = views_of(as_folder(tmp_path / "flat", data), RGB)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, plain, strict=True))


def test_datasets_turns_photos_the_same_way(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets", reason="the extra datasets is not installed")
    as_table(tmp_path, turned(6))
    theirs = hf.load_from_disk(tmp_path / "saved")["train"][0]["image"]
    assert np.array_equal(np.asarray(theirs), np.asarray(decode(turned(6))))
