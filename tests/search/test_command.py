"""The search on the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import ARCHITECTURE, Vitcompress, model_flags
from tests.search.factories import ROOMY
from vitcompress.initialize.start import start_student
from vitcompress.search.student import build_student


@pytest.fixture(scope="module")
def roomy_flags(tmp_path_factory: pytest.TempPathFactory, roomy: nn.Module) -> list[str]:
    path = tmp_path_factory.mktemp("roomy") / "roomy.safetensors"
    save_file(roomy.state_dict(), path)
    return [ARCHITECTURE, *model_flags(**ROOMY), "--checkpoint", str(path)]


QUICK = ("--num-workers", 0, "--device", "cpu", "--calibration-images", 8, "--kinds", "narrow")


@pytest.mark.thorough
def test_compress_reaches_a_ratio_and_says_why_and_how_fast_it_learns(
    roomy_flags: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "m.safetensors"
    words = ["--target-ratio", 2, "--data", images, "--steps", 2, "--batch-size", 4, *QUICK, "--min-ratio", 2]
    ended = vitcompress("compress", *roomy_flags, *words, "--out", out)
    assert ended.code == 0, ended
    assert "nats predicted" in ended.err
    assert "(random predictions: " in ended.err
    tree = json.loads((tmp_path / "m.report.json").read_text())
    assert 2 <= tree["size"]["params_ratio"] <= 2.5  # noise costs next to nothing, whatever is done
    assert tree["why"]
    for text in (ended.out, vitcompress("report", out).out, (tmp_path / "m.report.md").read_text()):
        assert "Chosen: " in text
        assert "nats predicted" in " ".join(text.split())


@pytest.mark.thorough
@pytest.mark.parametrize(
    "store", [pytest.param([], marks=pytest.mark.slow), ["--store", "source"]], ids=["any", "source"]
)
def test_the_file_is_no_larger_than_asked_for_with_the_longest_report(
    store: list[str], roomy_flags: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "m.safetensors"
    words = ["--target-size", "300kB", "--data", images, "--steps", 199, "--batch-size", 2, *QUICK, *store]
    ended = vitcompress("compress", *roomy_flags, *words, "--out", out)
    assert ended.code == 0, ended
    assert len(json.loads((tmp_path / "m.report.json").read_text())["train"]["loss_curve"]) == 199
    assert out.stat().st_size <= 300_000
    if store:  # else the whole model fits in fewer bits
        assert out.stat().st_size >= 0.85 * 300_000


@pytest.mark.thorough
def test_plan_searches_for_a_target_and_shows_why(roomy_flags: list[str], flat: Path, vitcompress: Vitcompress) -> None:
    words = ["plan", *roomy_flags, "--target-ratio", 2, "--calibrate", flat, "--kinds", "narrow,share", "-q"]
    ended = vitcompress(*words, "--calibration-images", 8, "--device", "cpu")
    assert (ended.code, ended.err) == (0, "")
    assert "Chosen: " in ended.out
    tree = json.loads(vitcompress(*words, "--calibration-images", 8, "--device", "cpu", "--json").out)
    assert tree["size"]["params_ratio"] >= 2
    assert tree["why"]


def test_plan_measures_options(teacher: list[str], flat: Path, vitcompress: Vitcompress) -> None:
    words = ["plan", *teacher, "--calibrate", flat, "--calibration-images", 8, "--kinds", "narrow,share,skip", "-q"]
    ended = vitcompress(*words)
    assert (ended.code, ended.err) == (0, "")
    assert "cost of each option, where all else is cut to about half" in ended.out
    rows = json.loads(vitcompress(*words, "--json").out)
    scales = {"mlp.hidden", "attn.qk", "attn.v", "attn.share", "mlp.share", "attn.skip", "mlp.skip"}
    assert {row["scale"] for row in rows} == scales
    assert all(scale in " ".join(ended.out.split()) for scale in scales)
    assert {row["kind"] for row in rows} == {"narrow", "share", "skip"}
    assert all(math.isfinite(row["nats"]) and row["nats"] >= 0 for row in rows)
    assert {tuple(sorted(row)) for row in rows} == {("blocks", "dial", "kind", "nats", "saved_params", "scale")}


def test_a_dry_run_says_that_the_plan_is_searched_for(teacher: list[str], vitcompress: Vitcompress) -> None:
    ended = vitcompress("compress", *teacher, "--target-ratio", 2, "--dry-run")
    assert ended.code == 0
    assert "the plan is searched for during the run" in ended.err
    assert "share nothing" not in ended.err
    assert "target_ratio: 2.0" in ended.out


def test_a_learning_rate_that_was_typed_wins(
    teacher: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    words = ["--share", 2, "--data", images, "--steps", 1, "--batch-size", 4, "--num-workers", 0, "--device", "cpu"]
    for typed in ([], ["--lr", "3e-4"]):
        ended = vitcompress("compress", *teacher, *words, *typed, "--out", tmp_path / "m.safetensors")
        assert ended.code == 0
        assert ("Learning rate: " in ended.err) == (not typed)


def test_the_start_that_the_search_built_is_the_one_that_is_compressed(
    roomy_flags: list[str], images: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fitted a second time: it would take as long as the building did."""
    students: list[nn.Module] = []

    def start(student: nn.Module, *rest: Any) -> None:
        students.append(student)
        start_student(student, *rest)

    def build(*args: Any) -> nn.Module:
        students.append(build_student(*args))
        return students[-1]

    monkeypatch.setattr("vitcompress.search.build.build_student", build)
    monkeypatch.setattr("vitcompress.pipeline.start.start_student", start)
    out = tmp_path / "m.safetensors"
    words = ["--target-ratio", 2, "--data", images, "--steps", 0, *QUICK[:-1], "narrow,low_rank", "--store", "source"]
    ended = vitcompress("compress", *roomy_flags, *words, "--transforms", "none", "--out", out)
    assert ended.code == 0, ended
    tree = json.loads((tmp_path / "m.report.json").read_text())
    assert len(students) == sum("nats measured" in line for line in tree["why"]) >= 1
    file = load_file(out)
    same = [
        student for student in students
        if all(name in file and torch.equal(file[name], t) for name, t in student.state_dict().items())
    ]  # fmt: skip
    assert len(same) == 1
