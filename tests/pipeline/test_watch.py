"""The accuracy curve of a training: what is measured, on which images, and what it costs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors.torch import save_file

from tests.conftest import ARCHITECTURE, Vitcompress, model_flags
from tests.distill.test_checkpoints import cut_short, same_tensors
from tests.factories import tiny
from vitcompress.data.calibration import draw_images
from vitcompress.data.sets import ImageSet
from vitcompress.distill.loop import _watch
from vitcompress.distill.state import TrainState
from vitcompress.errors import DataError
from vitcompress.measure.accuracy import Evaluator
from vitcompress.pipeline import watch
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


def test_features_that_are_not_finite_end_the_training_with_the_last_good_state(
    flat: Path, tmp_path: Path, vitcompress: Vitcompress, any_number: None
) -> None:
    out = tmp_path / "a.safetensors"
    model, weights = [ARCHITECTURE, *model_flags(num_classes=0)], tmp_path / "weights.safetensors"
    save_file(tiny(num_classes=0).state_dict(), weights)
    words = ["--data", flat, "--val-data", flat, "--steps", 4, "--lr", 1e14, "--warmup", 0]
    ended = vitcompress("compress", *model, "--checkpoint", weights, *WORDS, *words, "--out", out)
    assert ended.code == 2
    assert "not finite" in ended.err
    kept = tmp_path / "a.last-good.safetensors"
    points = train_part(kept)["accuracy_curve"]
    assert [point["step"] for point in points] == [0]
    assert "training" in json.loads(kept.with_suffix(".report.json").read_text())["seconds"]


def test_images_that_cannot_be_had_for_once_do_not_end_the_training(
    teacher: Sequence[str],
    images: Path,
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
    any_number: None,
) -> None:
    whole, calls = Evaluator.__call__, []

    def fail_once(self: Evaluator, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # after those of the classes, the start and the first step
            raise DataError("The shard cannot be read.")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "__call__", fail_once)
    out = tmp_path / "a.safetensors"
    ended = vitcompress("compress", *teacher, *WORDS, "--data", images, "--steps", 4, "--out", out)
    assert ended.code == 0, ended.err
    assert "after 2 steps: not measured. The shard cannot be read." in ended.err
    assert [point["step"] for point in train_part(out)["accuracy_curve"]] == [0, 1, 3, 4]


def test_a_quarter_that_a_slow_step_skips_is_not_made_up_for() -> None:
    state, done = TrainState(tiny(), tiny(), lr=0.1, num_steps=10, seconds=None), 0.0
    settings = SimpleNamespace(watch=lambda step, model: {"done": done})
    trainer: Any = SimpleNamespace(state=state, settings=settings, accelerator=Accelerator(cpu=True))
    for done in (0.0, 0.1, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0):
        _watch(trainer, done)
    assert [point["done"] for point in state.accuracy] == [0.0, 0.6, 0.8, 1.0]


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
    teacher: Sequence[str],
    images: Path,
    tmp_path: Path,
    vitcompress: Vitcompress,
    monkeypatch: pytest.MonkeyPatch,
    any_number: None,
) -> None:
    out = tmp_path / "a.safetensors"
    words = ["--data", images, "--target-ratio", 1.2, "--kinds", "narrow", "--max-minutes", 0.4]
    start = time.time()
    monkeypatch.setattr("vitcompress.cli.compress.STARTED", start)
    assert vitcompress("compress", *teacher, *WORDS[2:], *words, "--out", out).code == 0
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert tuple(report["seconds"]) == STAGES
    assert report["seconds"]["training"] >= report["train"]["seconds"] > 0
    assert 0 < sum(report["seconds"].values()) < time.time() - start
    assert 1 < len(report["train"]["accuracy_curve"]) <= 5


def test_images_are_drawn_from_the_whole_set() -> None:
    whole = ImageSet("numbers", list(range(1000)), list(range(1000)), tuple(range(1000)))  # type: ignore[arg-type]
    drawn = draw_images(whole, 100, seed=3)
    assert len(set(drawn.indices)) == 100
    assert 30 < sum(index < 500 for index in drawn.indices) < 70
    assert drawn == draw_images(whole, 100, seed=3) != draw_images(whole, 100, seed=4)
    assert sorted(draw_images(whole, 2000, seed=0).indices) == list(whole.indices)
