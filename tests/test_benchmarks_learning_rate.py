"""The grid of learning rates: what is run, what is kept, and what is not run again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import learning_rate
from tests.benchmarks._lines import read_lines
from tests.benchmarks.learning_rate import BUILT_IN, STARTS, Line, grid, run
from vitcompress.recipe import Recipe


@dataclass
class Accuracy:
    student_top1: float
    kl: float = 0.5


@dataclass
class Report:
    accuracy: Accuracy


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates that were trained with; nothing trains."""
    lrs: list[float] = []

    def compress(recipe: Recipe, out: Path) -> Report:
        assert recipe.distill.lr is not None
        lrs.append(recipe.distill.lr)
        return Report(Accuracy(1e5 * recipe.distill.lr))

    def measure_start(name: str, asked: Any, path: Path) -> Line:
        return Line(name, 0.0, asked.steps, asked.batch_size, asked.seed, None, 0.3, 2.0, 96, 600, 5.0, 5.0, 0.3, 90.0)

    monkeypatch.setattr("vitcompress.compress", compress, raising=False)
    monkeypatch.setattr(learning_rate, "measure_start", measure_start)
    return lrs


def words(out: Path, lrs: Sequence[float]) -> list[str]:
    return ["--starts", "fashion-share2", "--lrs", *map(str, lrs), "--out", str(out)]


def test_what_is_in_the_file_is_not_run_again(trained: list[float], tmp_path: Path) -> None:
    out = tmp_path / "build" / "lines.jsonl"
    run(words(out, [1e-4, 2e-4]))
    shown = run(words(out, [2e-4, 3e-4]))
    assert trained == [1e-4, 2e-4, 3e-4]
    assert [(line.lr, line.top1, line.top1_before) for line in read_lines(out, Line)] == [
        (lr, 1e5 * lr, 5.0) for lr in trained
    ]
    (row,) = shown.splitlines()[2:]
    assert "| 0.0003 | 0.0001: 10.00, 0.0002: 20.00, 0.0003: 30.00 |" in row
    run([*words(out, [1e-4]), "--steps", "3"])  # another run
    assert len(trained) == 4


def test_a_grid_is_geometric_and_the_same_each_time() -> None:
    lrs = grid(2e-4)
    assert 2e-4 in lrs
    assert all(later / lr == pytest.approx(1.5, rel=0.01) for lr, later in pairwise(lrs))
    assert json.loads(json.dumps(lrs)) == lrs


def test_every_start_is_a_recipe(monkeypatch: pytest.MonkeyPatch, trained: list[float], tmp_path: Path) -> None:
    monkeypatch.setattr(learning_rate, "_files", lambda name: [])
    run(["--starts", *STARTS, "--lrs", "1e-4", "--out", str(tmp_path / "lines.jsonl")])
    assert len(trained) == len(STARTS)
    assert {line.start for line in read_lines(tmp_path / "lines.jsonl", Line)} == {*STARTS}


def test_what_is_not_there_is_skipped_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: list[float], tmp_path: Path
) -> None:
    monkeypatch.setattr(learning_rate, "_files", lambda name: [tmp_path / "gone"])
    run(words(tmp_path / "lines.jsonl", [1e-4]))
    assert trained == []
    assert f"fashion-share2: skipped, there is no {tmp_path / 'gone'}" in capsys.readouterr().err


def test_by_default_only_the_built_in_model_trains(trained: list[float], tmp_path: Path) -> None:
    run(["--lrs", "1e-4", "--out", str(tmp_path / "lines.jsonl")])
    assert [line.start for line in read_lines(tmp_path / "lines.jsonl", Line)] == BUILT_IN
    assert asdict(read_lines(tmp_path / "lines.jsonl", Line)[0])["source_top1"] == 90.0
