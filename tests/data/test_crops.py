"""Without images, crops of the built-in photographs stand in, and reports say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tests.conftest import Vitcompress
from vitcompress.bundled import PHOTOGRAPHS
from vitcompress.data.calibration import calibration_batches, draw_images
from vitcompress.data.classes import ModelClasses
from vitcompress.data.crops import MIN_SIDE
from vitcompress.data.loaders import training_loader
from vitcompress.data.open import open_sets
from vitcompress.data.sets import ImageSet
from vitcompress.recipe import DataRecipe

CONFIG: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 0.9}
FALLBACK = "a fallback"


def sets() -> tuple[ImageSet, ImageSet]:
    train, val = open_sets(DataRecipe(data="built-in"), bundle=None, model=ModelClasses(5), seed=0)
    assert train is not None
    assert val is not None
    return train, val


def config(channels: int, size: int) -> dict[str, Any]:
    return {**CONFIG, "input_size": (channels, size, size), "mean": (0.5,) * channels, "std": (0.5,) * channels}


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.file)
def test_photographs_are_large_and_say_whose_they_are(photograph: Any) -> None:
    text = (photograph.path.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"| `photographs/{photograph.file}` | {photograph.author} | {photograph.licence} |" in text
    with Image.open(photograph.path) as image:
        assert min(image.size) > 1000
        assert image.format == "JPEG"


def test_the_package_stays_small() -> None:
    assert sum(photograph.path.stat().st_size for photograph in PHOTOGRAPHS) < 4e6


def test_crops_are_many_of_all_sizes_and_always_the_same() -> None:
    train, _ = sets()
    sizes = [train.reader.open(index).size for index in range(200)]
    assert len(set(sizes)) > 190
    assert min(min(size) for size in sizes) >= 0.86 * MIN_SIDE
    shorter = sorted(min(size) for size in sizes)
    assert shorter[50] < 250
    assert shorter[150] > 500
    again = sets()[0]
    assert all(train.reader.open(i).tobytes() == again.reader.open(i).tobytes() for i in range(3))


def test_what_is_measured_on_is_another_photograph() -> None:
    train, val = sets()
    assert len(val) == 256
    assert not set(train.reader.photographs) & set(val.reader.photographs)  # type: ignore[attr-defined]
    assert (train.labels, val.labels) == (None, None)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 384)])
def test_crops_fit_any_model_and_any_number_of_workers(channels: int, size: int) -> None:
    views = []
    for workers in (0, 2):
        recipe = DataRecipe(batch_size=3, num_workers=workers)
        loader = training_loader(sets()[0], config(channels, size), recipe, seed=0, num_steps=2)
        views.append(torch.cat([batch.images for batch in loader]))
    assert views[0].shape == (6, channels, size, size)
    assert torch.equal(*views)


def test_starts_can_be_fitted_to_crops() -> None:
    chosen = draw_images(sets()[0], 5, seed=0)
    (batch,) = calibration_batches(chosen, config(3, 32), DataRecipe(num_workers=0))
    assert batch.shape == (5, 3, 32, 32)


def test_compress_without_images_distils_on_crops_and_says_so(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    out = tmp_path / "mini.safetensors"
    words = ["compress", *teacher, "--share", 2, "--batch-size", 4, "--num-workers", 0, "--no-baselines"]
    ended = vitcompress(*words, "--steps", 2, "--calibration-images", 8, "--out", out)
    assert ended.code == 0, ended.err
    assert "start: fitted to 8 images" in ended.err
    assert "judged on 128 others" in ended.err
    assert FALLBACK in ended.err
    report = json.loads(vitcompress("report", out, "--json").out)
    assert report["data"] == f"crops of {len(PHOTOGRAPHS) - 1} built-in photographs"
    assert any(FALLBACK in note for note in report["notes"])
    accuracy = report["accuracy"]
    assert "crops of a built-in photograph that was not trained on" in accuracy["data"]
    assert accuracy["student_top1"] is None
    assert accuracy["agreement"] is not None
    assert accuracy["kl"] is not None
    again = vitcompress("evaluate", out, "--data", "built-in", "--num-workers", 0, "--json")
    assert json.loads(again.out)["num_images"] == 256


def test_the_recipe_says_which_images_were_used(vitcompress: Vitcompress, teacher: list[str]) -> None:
    shown = vitcompress("compress", *teacher, "--share", 2, "--dry-run").out
    assert yaml.safe_load(shown[shown.index("model:") :])["data"]["data"] == "built-in"
    shown = vitcompress("compress", *teacher, "--share", 2, "--steps", 0, "--start", "first", "--dry-run").out
    assert yaml.safe_load(shown[shown.index("model:") :])["data"]["data"] is None  # no step needs images


@pytest.mark.thorough
def test_images_that_are_named_win(tmp_path: Path, vitcompress: Vitcompress, teacher: list[str], images: Path) -> None:
    words = ["compress", *teacher, "--share", 2, "--steps", 1, "--batch-size", 4, "--num-workers", 0, "--no-baselines"]
    ended = vitcompress(*words, "--data", images, "--out", tmp_path / "a.safetensors")
    assert (ended.code, FALLBACK in ended.err) == (0, False)
    few = ["--calibration-images", 8]
    ended = vitcompress(*words, *few, "--val-data", images, "--out", tmp_path / "b.safetensors")
    report = json.loads(vitcompress("report", tmp_path / "b.safetensors", "--json").out)
    assert report["data"].startswith("crops of")
    assert report["accuracy"]["student_top1"] is not None  # trained on crops, measured on images


def test_a_plan_is_searched_for_on_crops_and_says_so(vitcompress: Vitcompress, teacher: list[str]) -> None:
    words = ["--target-ratio", 1.3, "--kinds", "share", "--calibration-images", 8, "--device", "cpu"]
    ended = vitcompress("plan", *teacher, *words)
    assert ended.code == 0, ended.err
    assert FALLBACK in ended.err


def test_crops_have_no_end_so_no_epochs(tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]) -> None:
    words = ["compress", *teacher, "--share", 2, "--epochs", 1, "--out", tmp_path / "x.safetensors"]
    for more, message in (([], "no images to pass over"), (["--data", "built-in"], "cannot be counted")):
        ended = vitcompress(*words, *more)
        assert (ended.code, message in ended.err, "--steps" in ended.err) == (2, True, True)
    assert not list(tmp_path.iterdir())


def test_labels_and_gates_on_accuracy_still_want_images(
    tmp_path: Path, vitcompress: Vitcompress, teacher: list[str]
) -> None:
    words = ["compress", *teacher, "--share", 2, "--out", tmp_path / "x.safetensors"]
    for flags in (["--loss", "labels=1"], ["--max-drop", 1]):
        ended = vitcompress(*words, *flags)
        assert (ended.code, "needs labeled images" in ended.err) == (2, True)
