"""Images of any kind become the tensors that a model takes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from tests.conftest import draw_image
from tests.data.opened import GREY, RGB, folder_set
from vitcompress.data.views import Views
from vitcompress.errors import DataError
from vitcompress.recipe import DataRecipe


def test_drawing_views_leaves_the_global_random_state_alone(flat: Path) -> None:
    views = Views(folder_set(flat), RGB, training=True, recipe=DataRecipe(), seed=0)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    drawn = [views[0, draw] for draw in range(3)]
    assert not torch.equal(drawn[0][0], drawn[1][0])  # type: ignore[arg-type]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]


def view_of(image: Image.Image, path: Path, kind: str, config: dict[str, Any]) -> torch.Tensor:
    """Save an image, and return its center crop with values 0–1."""
    image.save(path, format=kind)
    views = Views(folder_set(path.parent), config, training=False, recipe=DataRecipe(), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view = views[0, 0].view
    assert view is not None
    return view * 0.5 + 0.5


def palette(image: Image.Image, **info: Any) -> Image.Image:
    found = image.convert("P")
    found.info.update(info)
    return found


TWO_TONE = np.repeat(np.repeat(np.array([[60, 190]], np.uint8), 32, 0), 16, 1)


BASE = Image.fromarray(TWO_TONE)


FORMS: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "grey": ("PNG", lambda: BASE),
    "rgb": ("PNG", lambda: BASE.convert("RGB")),
    "cmyk": ("TIFF", lambda: BASE.convert("RGB").convert("CMYK")),
    "palette": ("PNG", lambda: palette(BASE)),
    "palette-with-transparency": ("PNG", lambda: palette(BASE, transparency=bytes([255] * 256))),
    "grey-with-alpha": ("PNG", lambda: BASE.convert("LA")),
    "rgb-with-alpha": ("PNG", lambda: BASE.convert("RGBA")),
    "webp": ("WEBP", lambda: BASE.convert("RGB")),
    "16-bit-png": ("PNG", lambda: Image.fromarray(TWO_TONE.astype(np.uint16) * 257)),
    "16-bit-tiff": ("TIFF", lambda: Image.fromarray(TWO_TONE.astype(np.uint16) * 257)),
}


@pytest.mark.parametrize("config", [RGB, GREY], ids=["rgb-model", "grey-model"])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_image_gives_the_same_picture(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    kind, draw = FORMS[form]
    view = view_of(draw(), tmp_path / "a.jpg", kind, config)  # the content counts: ImageNet has PNGs named .JPEG
    assert view.shape == config["input_size"]
    assert view[:, :, 4].mean() == pytest.approx(60 / 255, abs=0.03)
    assert view[:, :, 28].mean() == pytest.approx(190 / 255, abs=0.03)


def test_a_model_of_four_channels_is_refused(flat: Path) -> None:
    with pytest.raises(DataError, match="4 channels"):
        Views(folder_set(flat), {**RGB, "input_size": (4, 32, 32)}, training=False, recipe=DataRecipe(), seed=0)


def test_large_jpegs_are_decoded_no_larger_than_a_training_view_takes(tmp_path: Path) -> None:
    Image.fromarray(TWO_TONE).convert("RGB").resize((1600, 1200)).save(tmp_path / "a.jpg", quality=95)
    found = folder_set(tmp_path)
    sizes: list[tuple[int, int]] = []

    class Watched:
        def __len__(self) -> int:
            return 1

        def open(self, index: int, at_least: int = 0) -> Image.Image:
            image = found.reader.open(index, at_least)
            sizes.append(image.size)
            return image

        def where(self, index: int) -> str:
            return ""

    watched = replace(found, reader=Watched())
    for training in (True, False):
        views = Views(watched, RGB, training=training, recipe=DataRecipe(), seed=0)
        view = views[0, 0].view
        assert view is not None
        assert view.shape == (3, 32, 32)
    assert sizes == [(200, 150), (1600, 1200)]  # 1/8, whose smallest crop is still larger than 32; and full size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_no_broken_image_of_any_kind_crashes(kind: str, tmp_path: Path) -> None:
    path = draw_image(tmp_path / "a.png", 0)
    Image.open(path).save(path, format=kind)
    whole = path.read_bytes()
    views = Views(folder_set(tmp_path), RGB, training=False, recipe=DataRecipe(), seed=0)
    draw = random.Random(0)
    cuts = [whole[:n] for n in (0, 1, 10, len(whole) // 2, len(whole) - 20)]
    flips = []
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(4):
            broken[draw.randrange(min(len(whole), 200))] = draw.randrange(256)
        flips.append(bytes(broken))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in [*cuts, *flips]:
            path.write_bytes(content)
            found = views[0, 0]
            assert found.view is not None or str(path) in found.bad[0]
    path.write_bytes(cuts[3])
    assert views[0, 0].view is None


# --- crop modes, as timm has them


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8, 1.25])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_crops_as_timm_does(
    mode: str, crop_pct: float, size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    config = {
        "input_size": (channels, *size), "mean": (0.25,) * channels, "std": (0.5,) * channels, "crop_pct": crop_pct,
        "interpolation": "bilinear", "crop_mode": mode,
    }  # fmt: skip
    draw_image(tmp_path / "a.png", 0, size=(90, 40))
    views = Views(folder_set(tmp_path), config, training=False, recipe=DataRecipe(), seed=0)
    with Image.open(tmp_path / "a.png") as image:
        expected = create_transform(**config, is_training=False)(image.convert("RGB" if channels == 3 else "L"))
    view = views[0, 0].view
    assert view is not None
    assert torch.equal(view, expected)


def test_a_narrow_image_is_squashed_but_not_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (1, 100_000)).save(tmp_path / "a.png")
    for mode, readable in (("center", False), ("squash", True)):
        views = Views(folder_set(tmp_path), {**RGB, "crop_mode": mode}, training=False, recipe=DataRecipe(), seed=0)
        assert (views[0, 0].view is not None) is readable


def test_where_evaluation_squashes_training_does_too(tmp_path: Path) -> None:
    """Of an image four times as wide as high, the whole is a crop like any other."""
    ramp = np.repeat(np.linspace(0, 255, 128, dtype=np.uint8)[None], 32, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    recipe = DataRecipe(crop_min=0.9, hflip=0.0)
    spans = {}
    for mode in ("center", "squash"):
        views = Views(folder_set(tmp_path), {**RGB, "crop_mode": mode}, training=True, recipe=recipe, seed=0)
        drawn = [views[0, draw].view for draw in range(20)]
        spans[mode] = [float(view[0, 0, -1] - view[0, 0, 0]) * 0.5 for view in drawn if view is not None]
    assert min(spans["squash"]) > 0.75  # of all columns
    assert max(spans["center"]) < 0.5
