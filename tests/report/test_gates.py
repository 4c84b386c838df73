"""Gates are met or missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report.samples import ACCURACY, REPORT, UNLABELLED
from vitcompress.recipe import GateRecipe
from vitcompress.report.gates import missed_gates


@pytest.mark.parametrize(
    ("gates", "missed"),
    [
        (GateRecipe(max_drop=1.5, min_ratio=3.7, max_size=100), []),
        (GateRecipe(max_drop=1.4), ["--max-drop 1.4: top-1 drops by 1.50 points."]),
        (GateRecipe(min_ratio=9.0), ["--min-ratio 9: the student has only 3.77 times fewer parameters."]),
        (GateRecipe(max_size=99), ["--max-size 99 bytes: the file has 100 bytes."]),
    ],
    ids=str,
)
def test_gates(gates: GateRecipe, missed: list[str]) -> None:
    assert missed_gates(REPORT, gates, file_bytes=100) == missed


def test_a_gate_that_cannot_be_measured_is_missed() -> None:
    for report in (UNLABELLED, replace(REPORT, accuracy=None)):
        assert missed_gates(report, GateRecipe(max_drop=50.0), file_bytes=1)[0].startswith(
            "--max-drop 50: not measured"
        )


def test_a_ratio_that_is_no_number_meets_no_gate() -> None:
    for ratio in (float("nan"), float("inf")):
        report = replace(REPORT, size=replace(REPORT.size, params_ratio=ratio))
        assert missed_gates(report, GateRecipe(min_ratio=1.0), file_bytes=1)
    report = replace(REPORT, accuracy=replace(ACCURACY, top1_drop=float("nan")))
    assert missed_gates(report, GateRecipe(max_drop=1.0), file_bytes=1)
