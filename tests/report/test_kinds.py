"""Reports of labels and numbers show their own measures; gates of classes are missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report.samples import REPORT, shown
from vitcompress.measure.results import Accuracy, Baseline, OutputFit, unlabeled
from vitcompress.recipe import GateRecipe
from vitcompress.report.compare import cautions
from vitcompress.report.gates import missed_gates
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Report, Result, from_json, to_json
from vitcompress.report.page import cards, to_html

LABELS = unlabeled("multi_label", "flat", 40, 0, agreement=50.0, kl=1.25, mean_average_precision=87.5)
NUMBERS = unlabeled(
    "regression", "flat", 40, 0, kl=0.25, r2=0.75, relative_rmse=0.5,
    fits=(OutputFit(0, 0.7, 1.5, 3.0), OutputFit(1, 0.8, 0.1, 0.2)),
)  # fmt: skip


def report_of(accuracy: Accuracy) -> Report:
    return replace(REPORT, accuracy=accuracy, outputs=accuracy.outputs)


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (LABELS, ("50.00 %", "mean average precision", "87.50 %", "1.25 nats", "at probability 0.5")),
        (NUMBERS, ("R² against the teacher", "0.7500", "0.5000", "output 1: deviation, error, R²", "0.8000")),
    ],
    ids=["labels", "numbers"],
)
def test_every_rendering_has_the_measures_of_the_kind(accuracy: Accuracy, words: tuple[str, ...]) -> None:
    report = report_of(accuracy)
    assert from_json(to_json(report)) == report
    page = to_html(Result("mini.safetensors", 1, report, {}))
    for text in (shown(report), to_markdown(report)):
        assert all(word in " ".join(text.split()) for word in words), text
        assert "top-1" not in text
    assert all(word in page for word in words)
    assert "the outputs are" in page  # in the place of numbers for single classes


def test_the_headline_numbers_say_what_they_count() -> None:
    assert ("agreement", "50.00 %", "of labels get the same decision at 0.5 from both models") in cards(
        report_of(LABELS), 1
    )
    assert [card[:2] for card in cards(report_of(NUMBERS), 1)][2:] == [("R²", "0.7500"), ("error", "0.5000")]


def test_a_teacher_without_labels_has_no_precision_and_the_report_says_so() -> None:
    assert "The teacher finds no label" in shown(report_of(replace(LABELS, mean_average_precision=None)))


@pytest.mark.parametrize("accuracy", [LABELS, NUMBERS], ids=["labels", "numbers"])
def test_a_gate_on_top1_is_missed_with_the_reason(accuracy: Accuracy) -> None:
    (line,) = missed_gates(report_of(accuracy), GateRecipe(max_drop=1.0), file_bytes=1)
    assert f"there is no top-1 of {accuracy.outputs}" in line


def test_files_of_different_kinds_are_not_compared_silently() -> None:
    results = [Result(f"{number}", 1, report_of(row), {}) for number, row in enumerate((LABELS, NUMBERS))]
    assert any("different outputs" in line for line in cautions(results))
    assert not any("different outputs" in line for line in cautions(results[:1] * 2))


def test_a_better_baseline_is_told_by_the_kinds_measure() -> None:
    int8 = Baseline("teacher int8", 9, 9, None, None, None, None, r2=0.99)
    text = " ".join(shown(replace(report_of(NUMBERS), baselines=(int8,))).split())
    assert "has a better R² against the teacher (0.9900 against 0.7500)" in text


def test_what_was_not_compared_is_said() -> None:
    assert "Outputs were not compared" in shown(replace(REPORT, accuracy=None, outputs="regression"))
