"""Whole runs on real weights: DeiT-Tiny from `../shared/data`, and the model of `make demo`."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Vitcompress
from vitcompress.artifact.read import read_manifest
from vitcompress.quantize.codecs import decode_int8, encode_int8

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "deit_tiny.safetensors").is_file(), reason="../shared/data is not here")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of some classes: as many as half a minute allows."""
    root = tmp_path_factory.mktemp("few")
    for split, step in (("train", 12), ("val", 18)):
        for folder in sorted((DATA / "imagenet-compatible" / split).iterdir())[::step]:
            shutil.copytree(folder, root / split / folder.name)
    return root


def trained(vitcompress: Vitcompress, out: Path, images: Path, share: int, steps: int) -> Any:
    """The report of DeiT-Tiny compressed with its own weights."""
    words = ["--checkpoint", DATA / "deit_tiny.safetensors", "--data", images, "--share", share, "--steps", steps]
    words += ["--batch-size", 8, "--no-baselines", "--quiet"]  # baselines are the next test's
    ended = vitcompress("compress", "deit_tiny", *words, "--out", out)
    assert ended.code == 0, ended.err
    report = read_manifest(out).report
    assert report["accuracy"]["num_images"] == len(list((images / "val").glob("*/*")))
    assert report["size"]["teacher_params"] == 5_717_416
    return report


@pytest.mark.thorough
@needs_data
def test_deit_tiny_compresses_from_its_checkpoint(few: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    report = trained(vitcompress, tmp_path / "mini.safetensors", few, share=2, steps=2)
    assert report["accuracy"]["teacher_top1"] > 75  # 86 % of all images
    assert report["accuracy"]["kl"] < 5  # nats; chance is 6.9
    assert vitcompress("check", tmp_path / "mini.safetensors", "--min-ratio", 1.8).code == 0


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("share", [2, 12])
def test_deit_tiny_learns(share: int, tmp_path: Path, vitcompress: Vitcompress) -> None:
    images = DATA / "imagenet-compatible"
    start, report = (trained(vitcompress, tmp_path / f"{n}.safetensors", images, share, n) for n in (0, 20))
    assert report["accuracy"]["teacher_top1"] == pytest.approx(86.0, abs=0.5)
    assert report["accuracy"]["kl"] < start["accuracy"]["kl"]  # losses of single batches say little this early


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path: Path, vitcompress: Vitcompress) -> None:
    out = tmp_path / "mini.safetensors"
    words = ["compress", "fashion_vit", "--share", 12, "--out", out, "--max-drop", 2.5, "--min-ratio", 9, "--quiet"]
    assert vitcompress(*words).code == 0
    assert read_manifest(out).report["train"]["seconds"] < 180


def in_fewer_bits(vitcompress: Vitcompress, out: Path, images: Path, store: str, drop: float) -> Any:
    """The report of an untrained student that shares nothing, whose drop equals the baseline's."""
    words = ["--checkpoint", DATA / "deit_tiny.safetensors", "--data", images, "--quiet", "--share", 1, "--transforms"]
    words += ["none", "--steps", 0, "--store", store, "--num-workers", 0, "--device", "cpu", "--max-drop", drop]
    ended = vitcompress("compress", "deit_tiny", *words, "--out", out)
    assert ended.code == 0, ended.err
    report = read_manifest(out).report
    baseline = next(row for row in report["baselines"] if row["name"] == f"teacher {store}")
    assert baseline["top1"] == report["accuracy"]["student_top1"]
    assert baseline["bytes"] == report["size"]["student_bytes"]
    return report


@pytest.mark.thorough
@needs_data
def test_deit_tiny_in_int8_is_its_baseline(few: Path, tmp_path: Path, vitcompress: Vitcompress) -> None:
    in_fewer_bits(vitcompress, tmp_path / "mini.safetensors", few, "int8", 5.0)  # one image is five points


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("store", "drop"), [("int8", 0.5), ("int4", 2.0)])
def test_deit_tiny_bears_fewer_bits(store: str, drop: float, tmp_path: Path, vitcompress: Vitcompress) -> None:
    out = tmp_path / "mini.safetensors"
    report = in_fewer_bits(vitcompress, out, DATA / "imagenet-compatible", store, drop)
    assert report["accuracy"]["num_images"] == 400
    assert report["accuracy"]["teacher_top1"] == pytest.approx(86.0, abs=0.5)


@needs_data
def test_int8_is_plain_rounding_row_by_row() -> None:
    """Written down once more, on real weights."""
    weights = load_file(DATA / "deit_tiny.safetensors")
    for name in ("blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.weight", "head.weight"):
        rows = weights[name].float()
        scale = rows.abs().amax(1, keepdim=True) / 127
        found = decode_int8(*encode_int8(rows), tuple(rows.shape))
        torch.testing.assert_close(found, (rows / scale).round() * scale)
