"""A command that is given minutes takes them, whatever it has to do beside training."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from tests.conftest import Vitcompress
from tests.pipeline.test_start import prepared
from vitcompress.pipeline.budget import search_images, seconds_left
from vitcompress.runtime.stopwatch import Stopwatch


@pytest.mark.thorough
def test_the_minutes_count_from_the_start_of_the_command_and_evaluation_is_in_them(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, minutes, before = tmp_path / "a.safetensors", 0.5, 5.0
    monkeypatch.setattr("vitcompress.cli.compress.STARTED", time.time() - before)
    start = time.perf_counter()
    words = ["--data", images, "--share", 2, "--batch-size", 4, "--num-workers", 0, "--device", "cpu"]
    assert vitcompress("compress", *teacher, *words, "--max-minutes", minutes, "--out", out).code == 0
    took = before + time.perf_counter() - start
    trained = json.loads(out.with_suffix(".report.json").read_text())["train"]
    assert trained["steps"] > 1
    assert 0.25 * 60 * minutes < took < 60 * minutes + 3
    assert trained["seconds"] < 60 * minutes - before


def test_too_few_minutes_still_give_a_step_and_a_verified_file(
    teacher: Sequence[str], images: Path, tmp_path: Path, vitcompress: Vitcompress
) -> None:
    out = tmp_path / "a.safetensors"
    words = ["--data", images, "--share", 2, "--batch-size", 4, "--num-workers", 0, "--device", "cpu"]
    ended = vitcompress("compress", *teacher, *words, "--max-minutes", 0.001, "--out", out)
    assert (ended.code, "verified" in ended.err) == (0, True)
    assert json.loads(out.with_suffix(".report.json").read_text())["train"]["steps"] == 1


def test_what_is_left_is_never_nothing(flat: Path, weights: Path) -> None:
    run = prepared(flat, weights, None, {"max_minutes": 1.0}, 8)
    assert seconds_left(run, 20.0) == pytest.approx(40, abs=1)
    assert seconds_left(replace(run, clock=Stopwatch(time.time() - 100))) == 0.001


@pytest.mark.parametrize(("minutes", "images"), [(0.001, 64), (10, 256), (60, 1024), (10_000, 1024)])
def test_a_search_measures_on_as_many_images_as_a_quarter_of_the_minutes_allows(
    minutes: float, images: int, flat: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            clock[0] += 0.02 * len(x)
            return x

    run = prepared(flat, weights, None, {"max_minutes": minutes}, 8)
    monkeypatch.setattr("vitcompress.pipeline.budget.time.perf_counter", lambda: clock[0])
    assert search_images(run, Slow()) == images
