"""What commands say of a checkpoint, and where its key can be given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ARCHITECTURE, Vitcompress, model_flags
from tests.factories import save_as_timm_does, tiny
from tests.pretrained.test_states import fresh, near, under

FAST = ["--share", 2, "--start", "first", "--steps", 0, "--num-workers", 0, "--no-baselines"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of `tiny()` beside an average that did not follow them."""
    path = tmp_path_factory.mktemp("both") / "both.pth"
    weights = dict(tiny().state_dict())
    torch.save({"model": under("backbone.", weights), "model_ema": fresh(weights), "epoch": 1}, path)
    return path


def test_compress_asks_for_a_key_and_takes_it(
    both: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["compress", ARCHITECTURE, *model_flags(), "--checkpoint", both, "--val-data", images / "val", *FAST]
    ended = vitcompress(*words, "--out", tmp_path / "m.safetensors")
    assert ended.code == 2
    assert "--checkpoint-key model or --checkpoint-key model_ema" in ended.err
    out = tmp_path / "m.safetensors"
    ended = vitcompress(*words, "--checkpoint-key", "model", "--out", out)
    assert ended.code == 0, ended.err
    notes = json.loads(vitcompress("report", out, "--json").out)["notes"]
    for note in ("the weights under model were taken.", "the prefix backbone. was taken off the names."):
        assert note in ended.err.replace("\n", "")
        assert any(line.endswith(note) for line in notes)


def test_a_key_without_a_checkpoint_is_a_mistake(vitcompress: Vitcompress, mini: Path, images: Path) -> None:
    for words in (
        ["compress", ARCHITECTURE, "--checkpoint-key", "model", "--out", "m.safetensors"],
        ["evaluate", mini, "--data", images, "--checkpoint-key", "model"],
        ["report", mini, "--html", "page.html", "--data", images, "--checkpoint-key", "model"],
    ):
        ended = vitcompress(*words)
        assert ended.code == 2
        assert "--checkpoint-key needs --checkpoint" in ended.err
    words = [
        "compress",
        "fashion_vit",
        "--teacher",
        "vit_tiny",
        "--teacher-checkpoint-key",
        "x",
        "--out",
        "m.safetensors",
    ]
    assert "--teacher-checkpoint-key needs --teacher-checkpoint" in vitcompress(*words).err


def test_evaluate_and_report_take_a_key(
    both: Path, mini: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    evaluate = ["evaluate", mini, "--data", images, "--num-workers", 0, "--checkpoint", both]
    assert "--checkpoint-key model or" in vitcompress(*evaluate).err
    ended = vitcompress(*evaluate, "--checkpoint-key", "model", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["teacher_top1"] is not None
    page = ["report", mini, "--html", tmp_path / "p.html", "--data", images, "--num-workers", 0, "--checkpoint", both]
    assert vitcompress(*page).code == 2
    assert vitcompress(*page, "--checkpoint-key", "model").code == 0
    folder = save_as_timm_does(tmp_path / "m", tiny().state_dict())
    named = [*evaluate, "--teacher", f"local-dir:{folder}"]
    assert "--checkpoint-key model or" in vitcompress(*named).err
    assert vitcompress(*named, "--checkpoint-key", "model").code == 0


def test_a_teachers_checkpoint_has_its_own_key(
    both: Path, weights: Path, images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    args = [word if word != "--model-arg" else "--teacher-arg" for word in model_flags()]
    words = [
        "compress", ARCHITECTURE, *model_flags(), "--checkpoint", weights, "--teacher", ARCHITECTURE, *args,
        "--teacher-checkpoint", both, "--data", images, *FAST, "--steps", 1, "--batch-size", 2,
        "--out", tmp_path / "m.safetensors",
    ]  # fmt: skip
    ended = vitcompress(*words)
    assert ended.code == 2
    assert f"--teacher-checkpoint {both} holds" in ended.err.replace("\n", "")
    assert "--teacher-checkpoint-key model or --teacher-checkpoint-key model_ema" in ended.err
    ended = vitcompress(*words, "--teacher-checkpoint-key", "model")
    assert ended.code == 0, ended.err
    assert f"--teacher-checkpoint {both}: the weights under model were taken." in ended.err.replace("\n", "")


def test_an_average_that_followed_is_taken_and_said(images: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    weights = dict(tiny().state_dict())
    torch.save({"model": near(weights), "model_ema": weights}, tmp_path / "w.pth")
    words = ["compress", ARCHITECTURE, *model_flags(), "--checkpoint", tmp_path / "w.pth", *FAST]
    ended = vitcompress(*words, "--out", tmp_path / "m.safetensors")
    assert ended.code == 0
    assert "model_ema was taken, the moving average of model, as timm does." in ended.err


def test_stdout_has_the_result_only_where_a_checkpoint_is_resampled(
    weights: Path, images: Path, vitcompress: Vitcompress
) -> None:
    words = ["plan", ARCHITECTURE, *model_flags(patch_size=16, img_size=64, depth=4), "--checkpoint", weights]
    ended = vitcompress(
        *words, "--calibrate", images / "train", "--calibration-images", 4, "--kinds", "share", "--json"
    )
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)
    assert "patch embedding resampled from 8x8 to 16x16." in ended.err
