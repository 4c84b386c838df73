"""Variants of a training: what is run, what is kept, and what is not run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.benchmarks import minutes
from tests.benchmarks._lines import read_lines
from tests.benchmarks.minutes import Line, run


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, nn.Module]]:
    """The starts that variants were trained from; nothing trains."""
    trained: list[tuple[str, nn.Module]] = []
    begun: list[nn.Module] = []

    def make_student(given: Any, source: nn.Module) -> tuple[nn.Module, nn.Module]:
        begun.append(nn.Linear(1, 1))
        return begun[-1], source

    def train(given: Any, source: nn.Module, student: nn.Module, name: str, variant: str) -> Line:
        assert student is not begun[-1]
        trained.append((variant, begun[-1]))
        recipe = given.recipe
        return Line(name, variant, recipe.run.seed, recipe.distill.steps, 10.0, 70.0, 80.0 + recipe.run.seed, 0.5)

    monkeypatch.setattr(minutes, "make_student", make_student)
    monkeypatch.setattr(minutes, "_trained", train)
    return trained


def test_variants_of_a_seed_train_the_same_start_once(starts: list[tuple[str, nn.Module]], tmp_path: Path) -> None:
    out = tmp_path / "build" / "lines.jsonl"
    words = ["--out", str(out), "--variants", "", "mixup=0.5 steps=7", "refine=9", "--seeds", "0", "2"]
    run(words)
    shown = run(words)
    assert [variant for variant, _ in starts] == ["", "mixup=0.5 steps=7", "refine=9"] * 2
    assert starts[0][1] is starts[1][1]
    assert len({id(start) for _, start in starts}) == 4  # one for each seed, and for each start of its own
    assert [line.steps for line in read_lines(out, Line)] == [200, 7, 200] * 2
    assert "| fashion-share2 | default | 200 | 10 | 70.00 % | 81.00 % (80.00–82.00) | 0.500 | 2 |" in shown.splitlines()


@pytest.mark.thorough
def test_a_variant_is_trained_and_measured(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    run(["--out", str(out), "--start", "fashion-width0.5", "--variants", "steps=2 batch_size=8 refine=2"])
    (line,) = read_lines(out, Line)
    assert (line.steps, line.variant) == (2, "steps=2 batch_size=8 refine=2")
    assert 50 < line.top1_before < 91
    assert line.seconds > 0
    assert line.kl > 0
