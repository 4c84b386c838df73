"""The picture of size against top-1."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report.samples import REPORT, UNLABELLED
from vitcompress.report.markdown import to_markdown
from vitcompress.report.model import Parent, Report
from vitcompress.report.picture import Point, alt_text, draw_sizes, points_of, to_svg


def test_the_picture_is_the_same_each_time_and_is_told_in_words() -> None:
    svg = to_svg(REPORT)
    assert svg is not None
    assert svg == to_svg(REPORT)
    assert "<dc:date>" not in svg
    text = "Size against top-1: teacher 346.27 MB, 86.00 %; student 91.81 MB, 84.50 %."
    assert f"![{text}](my%20mini.report.svg)" in to_markdown(REPORT, picture="my mini.report.svg")
    assert "![" not in to_markdown(REPORT)


@pytest.mark.parametrize("report", [UNLABELLED, replace(REPORT, accuracy=None)])
def test_without_two_accuracies_nothing_is_drawn(report: Report) -> None:
    assert to_svg(report) is None


def test_a_teacher_whose_size_is_not_the_reports_is_not_drawn() -> None:
    tuned = replace(REPORT, lineage=(Parent("mini.safetensors", "0" * 64, "vitcompress compress deit_base"),))
    assert [point.name for point in points_of(tuned)] == ["student"]
    own = replace(tuned, train=replace(REPORT.train, teacher=REPORT.model))
    assert [point.name for point in points_of(own)] == ["teacher", "student"]


def test_names_of_any_kind_and_points_in_one_place_can_be_drawn() -> None:
    names = ("$x_1", "日本", "a" * 80, "[link](x)", "_x")
    points = [Point(name, 1_000_000, 90.0, "baseline") for name in names]
    svg = draw_sizes(points, "$title_1")
    assert svg.startswith("<?xml")
    assert all(f"<!-- {name}, 1.00 MB, 90.00 % -->" in svg for name in ("$x_1", "[link](x)", "_x"))
    assert "]" not in alt_text(points)
