"""The preprocessing is told by every command, kept in the file, and used by all that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor

import vitcompress as package
from tests.conftest import Vitcompress, draw_image, model_flags
from tests.factories import save_as_timm_does, tiny
from tests.pretrained.test_transformers_folder import ROWS, save
from tests.pretrained.test_transformers_preprocessor import BASE
from vitcompress.artifact.read import read_manifest
from vitcompress.data.loaders import training_loader
from vitcompress.data.preprocessing import describe_preprocessing
from vitcompress.pipeline.evaluate import evaluate
from vitcompress.recipe import DataRecipe

LINE = "32 x 32 px, squash to 40 x 40 (bilinear), center crop; mean 0.3, 0.3, 0.3; deviation 0.2, 0.2, 0.2"
FLAGS = ("--mean", "0.3", "--std", "0.2", "--interpolation", "bilinear", "--crop-pct", 0.8, "--crop-mode", "squash")
QUICK = ("--share", 1, "--transforms", "none", "--steps", 0, "--no-baselines", "--num-workers", 0, "--device", "cpu")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `val/` of five classes, of images that are twice as wide as high."""
    root = tmp_path_factory.mktemp("wide")
    for split in ("train", "val"):
        for label in range(5):
            draw_image(root / split / str(label) / "0.png", label, size=(80, 40))
    return root


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", **IMAGENET},
            "224 x 224 px, resize to 256 (bicubic), center crop; mean 0.485, 0.456, 0.406; deviation 0.229, 0.224, "
            "0.225",
        ),
        (
            {"input_size": (1, 28, 28), "crop_pct": 1.0, "interpolation": "nearest", "mean": (0.286,), "std": (0.353,)},
            "28 x 28 px, gray, resize to 28 (nearest), center crop; mean 0.286; deviation 0.353",
        ),
        (
            {"input_size": (3, 32, 48), "crop_pct": 0.8, "crop_mode": "center", "mean": (0.5,), "std": (1 / 255,)},
            "32 x 48 px (rows x columns), resize to cover 40 x 60 (bicubic), center crop; mean 0.5; deviation "
            "0.00392157",
        ),
        (
            {"input_size": (3, 32, 32), "crop_mode": "squash", "mean": (0.5,), "std": (0.5,)},
            "32 x 32 px, squash to 32 x 32 (bicubic); mean 0.5; deviation 0.5",
        ),
        (
            {"input_size": (3, 32, 32), "crop_mode": "border", "mean": (0.5,), "std": (0.5,)},
            "32 x 32 px, resize to fit into 32 x 32 (bicubic), borders of the mean color; mean 0.5; deviation 0.5",
        ),
        (
            {"input_size": (3, 32, 32), "crop_pct": 1.25, "mean": (0.5,), "std": (0.5,)},
            "32 x 32 px, resize to 25 (bicubic), black borders; mean 0.5; deviation 0.5",
        ),
    ],
)
def test_a_line_tells_all_of_it(config: dict[str, Any], line: str) -> None:
    assert describe_preprocessing(config) == line


def test_a_plan_and_a_dry_run_tell_it(vitcompress: Vitcompress, no_network: None) -> None:
    model = ["vit_tiny", *model_flags(), *FLAGS]
    assert f"Preprocessing: {LINE}." in words_of(vitcompress("plan", *model, "--share", 2).out)
    assert json.loads(vitcompress("plan", *model, "--share", 2, "--json").out)["preprocessing"] == LINE
    assert f"preprocessing: {LINE}" in words_of(vitcompress("compress", *model, "--dry-run").err)


@pytest.mark.thorough
def test_the_file_its_reports_and_all_that_read_it_have_it(
    tmp_path: Path, wide: Path, teacher: list[str], vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "m.safetensors", tmp_path / "m.html"
    ended = vitcompress("compress", *teacher, *FLAGS, *QUICK, "--data", wide, "--out", out)
    assert ended.code == 0
    assert f"preprocessing: {LINE}" in words_of(ended.err)
    assert f"Preprocessing: {LINE}." in words_of(ended.out)
    assert json.loads(vitcompress("report", out, "--json").out)["preprocessing"] == LINE
    assert f"Preprocessing: {LINE}." in vitcompress("report", out, "--markdown").out
    assert vitcompress("report", out, "--html", page).code == 0
    assert f"Preprocessing: {LINE}." in page.read_text()
    config = dict(read_manifest(out).data_config)
    assert (config["crop_mode"], config["mean"]) == ("squash", (0.3,) * 3)
    loaded = timm.data.resolve_model_data_config(package.load(out))
    assert loaded == config

    seen: list[Tensor] = []
    evaluate(out, DataRecipe(data=str(wide / "val"), num_workers=0), watch=lambda images, *rest: seen.append(images))
    transform = timm.data.create_transform(**config, is_training=False)
    expected = [transform(Image.open(wide / "val" / str(label) / "0.png")) for label in range(5)]
    assert torch.equal(torch.cat(seen), torch.stack(expected))

    used: list[Any] = []

    def load(images: Any, config: Any, *args: Any, **more: Any) -> Any:
        used.append(config)
        return training_loader(images, config, *args, **more)

    monkeypatch.setattr("vitcompress.pipeline.train.training_loader", load)
    tuned = tmp_path / "tuned.safetensors"
    words = ["--data", wide, "--steps", 1, "--batch-size", 5, "--num-workers", 0, "--device", "cpu", "--out", tuned]
    ended = vitcompress("finetune", out, *words)
    assert ended.code == 0
    assert used == [config]
    assert dict(read_manifest(tuned).data_config) == config
    assert f"preprocessing: {LINE}" in words_of(ended.err)
    assert read_manifest(tuned).report["preprocessing"] == LINE


@pytest.mark.thorough
def test_a_folder_of_transformers_is_evaluated_as_its_preprocessor_says(
    tmp_path: Path, wide: Path, vitcompress: Vitcompress
) -> None:
    save(ROWS["vit"], tmp_path / "m")
    for name, change, line in (
        ("a", {}, "squash to 32 x 32 (bilinear); mean 0.5, 0.5, 0.5; deviation 0.5, 0.5, 0.5"),
        ("b", {"do_normalize": False}, "squash to 32 x 32 (bilinear); mean 0, 0, 0; deviation 1, 1, 1"),
    ):
        (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**BASE, **change}))
        out = tmp_path / f"{name}.safetensors"
        ended = vitcompress("compress", f"local-dir:{tmp_path / 'm'}", *QUICK, "--val-data", wide / "val", "--out", out)
        assert ended.code == 0, ended.err
        assert line in read_manifest(out).report["preprocessing"]
        assert "no effect" not in ended.err
    ended = vitcompress("plan", f"local-dir:{tmp_path / 'm'}", "--share", 1, "--crop-mode", "border")
    assert "borders of the mean color" in words_of(ended.out)
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**BASE, "image_mean": [127.5] * 3}))
    for command in (["plan"], ["compress", *QUICK, "--val-data", wide / "val", "--out", tmp_path / "c.safetensors"]):
        ended = vitcompress(command[0], f"local-dir:{tmp_path / 'm'}", *command[1:])
        assert ended.code == 2
        assert ": image_mean in its config is 127.5,127.5,127.5" in words_of(ended.err)
        assert "--mean 0.5,0.5,0.5 --std 0.5,0.5,0.5" in words_of(ended.err)
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps({**BASE, "do_flip_channel_order": True}))
    ended = vitcompress("plan", f"local-dir:{tmp_path / 'm'}")
    assert (ended.code, "do_flip_channel_order" in ended.err) == (2, True)
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    ended = vitcompress("plan", f"local-dir:{tmp_path / 'm'}", "--share", 1)
    assert "There is no preprocessor_config.json" in words_of(ended.err)
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps({"image_processor": {**BASE, "resample": 0}}))
    assert "squash to 32 x 32 (nearest)" in words_of(vitcompress("plan", f"local-dir:{tmp_path / 'm'}").out)


def test_a_search_takes_the_preprocessing_of_a_folder(tmp_path: Path, vitcompress: Vitcompress) -> None:
    config = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_mode": "squash", "input_size": [3, 32, 32]}
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict(), pretrained_cfg=config)
    for number in range(6):
        draw_image(tmp_path / "images" / f"{number}.png", number, size=(80, 40))
    words = ["--calibrate", tmp_path / "images", "--calibration-images", 4, "--target-ratio", 1.2, "--kinds", "share"]
    ended = vitcompress("plan", f"local-dir:{folder}", *words, "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "squash to 36 x 36 (bicubic), center crop" in words_of(ended.out)
