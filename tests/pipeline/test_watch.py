"""The accuracy curve of a training: what is measured, on which images, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Vitcompress
from tests.distill.test_checkpoints import cut_short, same_tensors
from vitcompress.data.sets import ImageSet
from vitcompress.pipeline import watch
from vitcompress.pipeline.watch import some_images
from vitcompress.report.model import from_json
from vitcompress.report.remarks import STAGES


@pytest.fixture
def any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images are enough, and there is time for them."""
    monkeypatch.setattr(watch, "MIN_IMAGES", 1)
    monkeypatch.setattr("vitcompress.pipeline.budget._WATCHED_SHARE", 100.0)


def train_part(out: Path) -> dict[str, list[dict[str, float]]]:
    tree = json.loads(out.with_suffix(".report.json").read_text())
    assert from_json(tree).train.accuracy_curve == tuple(tree["train"]["accuracy_curve"])
    part: dict[str, list[dict[str, float]]] = tree["train"]
    return part


WORDS = ["--share", 2, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--no-baselines"]


@pytest.mark.parametrize(
    "more",
    [[], ["--ema", 0.5, "--fade", 0.6, "--small-first", 0.5, "--store", "int8", "--qat-fraction", 0.5]],
    ids=["plain", "with everything that changes the student in training"],
)
def test_the_last_point_is_what_the_file_holds(
    more: Sequence[object],
    teacher: Sequence[str],
    images: Path,
    tmp_path: Path,
    vitcompress: Vitcompress,
    any_number: None,
) -> None:
    out = tmp_path / "a.safetensors"
    ended = vitcompress("compress", *teacher, *WORDS, "--data", images, "--lr", 1e-2, "--steps", 8, *more, "--out", out)
    assert ended.code == 0, ended.err
    points = train_part(out)["accuracy_curve"]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert [point["step"] for point in points] == [0, 2, 4, 6, 8]
    assert {point["images"] for point in points} == {report["accuracy"]["num_images"]}
    assert points[-1]["top1"] == report["accuracy"]["student_top1"]
    assert f"before training, on 10 validation images: top-1 {points[0]['top1']:.2f} %" in ended.err
    assert f"after 8 steps: top-1 {points[-1]['top1']:.2f} %" in ended.err


def test_the_first_point_is_the_start(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress, any_number: None
) -> None:
    out, start = tmp_path / "a.safetensors", tmp_path / "start.safetensors"
    words = ["compress", *teacher, *WORDS, "--data", images, "--fade", 0.6]
    assert vitcompress(*words, "--steps", 2, "--lr", 1e-2, "--out", out).code == 0
    assert vitcompress(*words, "--steps", 0, "--out", start).code == 0
    top1 = json.loads(start.with_suffix(".report.json").read_text())["accuracy"]["student_top1"]
    assert train_part(out)["accuracy_curve"][0]["top1"] == top1
    assert train_part(start)["accuracy_curve"] == []


def test_without_labels_it_is_agreement_with_the_source(
    teacher: Sequence[str], flat: Path, tmp_path: Path, vitcompress: Vitcompress, any_number: None
) -> None:
    out = tmp_path / "a.safetensors"
    words = ["--data", flat, "--val-data", flat, "--steps", 3]
    assert vitcompress("compress", *teacher, *WORDS, *words, "--out", out).code == 0
    points = train_part(out)["accuracy_curve"]
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert points[-1] == {"step": 3, "images": 12, "agreement": report["accuracy"]["agreement"]}


@pytest.mark.thorough
def test_it_changes_no_weight_and_a_resumed_run_has_the_whole_curve(
    teacher: Sequence[str],
    images: Path,
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
    any_number: None,
) -> None:
    words = ["compress", *teacher, *WORDS, "--data", images, "--steps", 7, "--drop-path", 0.3, "--save-every", 2]
    whole, cut, without = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "without"))
    assert vitcompress(*words, "--out", whole).code == 0
    cut_short(monkeypatch, vitcompress, words, cut, 5)
    assert vitcompress(*words, "--out", cut, "--resume").code == 0
    monkeypatch.setattr(watch, "MIN_IMAGES", 10**9)
    assert vitcompress(*words, "--out", without).code == 0
    assert train_part(without)["accuracy_curve"] == []
    assert train_part(cut)["accuracy_curve"] == train_part(whole)["accuracy_curve"]
    assert same_tensors(whole, cut)
    assert same_tensors(whole, without)


def test_a_short_training_is_not_measured(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "a.safetensors"
    assert vitcompress("compress", *teacher, *WORDS, "--data", images, "--steps", 4, "--out", out).code == 0
    assert train_part(out)["accuracy_curve"] == []


def test_finetuning_is_measured_and_the_report_says_where_the_time_went(
    mini: Path, regrouped: Path, tmp_path: Path, vitcompress: Vitcompress, any_number: None
) -> None:
    out = tmp_path / "b.safetensors"
    words = ["--data", regrouped, "--steps", 4, "--batch-size", 4, "--num-workers", 0, "--device", "cpu"]
    ended = vitcompress("finetune", mini, *words, "--out", out)
    assert ended.code == 0, ended.err
    assert [point["step"] for point in train_part(out)["accuracy_curve"]] == [0, 1, 2, 3, 4]
    seconds = json.loads(out.with_suffix(".report.json").read_text())["seconds"]
    assert list(seconds) == ["loading", "training", "evaluation"]
    shown = vitcompress("report", out).out
    assert "During training, top-1 on 6 of these images:" in " ".join(shown.split())
    assert f"training {seconds['training']:.0f} s" in " ".join(shown.split())


def test_minutes_are_shared_by_what_a_compression_does(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "a.safetensors"
    words = ["--data", images, "--target-ratio", 1.2, "--kinds", "narrow", "--max-minutes", 0.001]
    assert vitcompress("compress", *teacher, *WORDS[2:], *words, "--out", out).code == 0
    seconds = json.loads(out.with_suffix(".report.json").read_text())["seconds"]
    assert tuple(seconds) == STAGES
    assert all(value >= 0 for value in seconds.values())


def test_images_are_drawn_from_the_whole_set() -> None:
    whole = ImageSet("numbers", list(range(1000)), list(range(1000)), tuple(range(1000)))  # type: ignore[arg-type]
    drawn = some_images(whole, 100, seed=3)
    assert len(set(drawn.indices)) == 100
    assert list(drawn.indices) == sorted(drawn.indices)
    assert 30 < sum(index < 500 for index in drawn.indices) < 70
    assert drawn == some_images(whole, 100, seed=3) != some_images(whole, 100, seed=4)
    assert some_images(whole, 2000, seed=0) == whole
