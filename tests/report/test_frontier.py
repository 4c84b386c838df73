"""The best plans for many budgets as table, JSON, drawing and page."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.report.pages import Seen, assert_safe, needs_chromium, shown_by_chromium
from vitcompress.plans.model import Size
from vitcompress.report.frontier import (
    COLUMNS,
    frontier_html,
    frontier_json,
    frontier_rows,
    frontier_svg,
    frontier_text,
    print_frontier,
)
from vitcompress.search.frontier import FrontierPoint

EVIL = '<script>alert("x")</script>[bold]$x_1'


def point(ratio: float, nats: float, kinds: tuple[str, ...] = ("narrow",), **marks: bool) -> FrontierPoint:
    params = round(10_000_000 / ratio)
    size = Size(10_000_000, params, round(ratio, 4), 40_000_000, 4 * params, ratio, 2_000_000_000, 200 * params, ratio)
    return FrontierPoint(ratio, size, nats, kinds, **marks)


POINTS = [
    point(1.25, 1e-9, is_common=True),
    point(1.4, 0.002),
    point(2.0, 0.05, is_common=True),
    point(3.0, 0.125, ("narrow", "low_rank"), is_common=True, is_knee=True),
    point(4.5, 0.9, ()),
]


def test_rows_hold_the_numbers_and_the_marks() -> None:
    assert frontier_rows(POINTS)[2:4] == [
        ("2.00×", "5,000,000", "20.00 MB", "1 G", "0.05", "narrow", "target"),
        ("3.00×", "3,333,333", "13.33 MB", "667 M", "0.12", "narrow, low_rank", "target, knee"),
    ]
    assert frontier_rows(POINTS)[4][5:] == ("–", "")
    unsized = replace(POINTS[0], size=replace(POINTS[0].size, student_macs=None))
    assert frontier_rows([unsized])[0][3] == "–"
    assert all(len(row) == len(COLUMNS) for row in frontier_rows(POINTS))


def test_json_holds_every_number_in_full() -> None:
    tree = json.loads(json.dumps(frontier_json(POINTS)))
    assert tree[3] == {
        "target_ratio": 3.0, "ratio": 3.0, "params": 3_333_333, "bytes": 13_333_332, "macs": 666_666_600,
        "predicted_nats": 0.125, "kinds": ["narrow", "low_rank"], "common_target": True, "knee": True,
    }  # fmt: skip
    assert [row["knee"] for row in tree] == [False, False, False, True, False]


def test_the_terminal_shows_names_as_they_are() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    print_frontier(POINTS, EVIL, console)
    text = console.export_text()
    assert EVIL in text
    assert "target, knee" in text
    assert "predicted cost before any training" in " ".join(text.split())


def test_the_drawing_is_the_same_each_time_and_has_three_panels() -> None:
    svg = frontier_svg(POINTS, EVIL)
    assert svg == frontier_svg(POINTS, EVIL)
    ElementTree.fromstring(svg)
    for label in ("parameters (millions)", "bytes (MB)", "multiply-accumulates (G)", "knee", "common targets", "3×"):
        assert f"<!-- {label} -->" in svg
    assert svg.count("<!-- 3× -->") == 3
    assert "<!-- 1.25× -->" not in svg  # next to nothing, below the axis
    assert "<!-- 4.5× -->" not in svg  # no common target


def test_without_operations_there_are_two_panels() -> None:
    unsized = [replace(p, size=replace(p.size, student_macs=None)) for p in POINTS]
    svg = frontier_svg(unsized, "")
    assert svg.count("<!-- 3× -->") == 2
    assert "multiply-accumulates" not in svg


def test_small_models_are_drawn_in_millions_of_operations() -> None:
    small = [replace(p, size=replace(p.size, student_macs=1_000_000)) for p in POINTS]
    assert "multiply-accumulates (M)" in frontier_svg(small, "")


@pytest.mark.parametrize("points", [POINTS[:1], [replace(POINTS[0], predicted_nats=0.0)]], ids=["one", "free"])
def test_a_single_point_can_be_drawn(points: list[FrontierPoint]) -> None:
    assert "<svg" in frontier_svg(points, "m")


def test_the_page_is_safe_and_says_the_drawing_in_words() -> None:
    html = frontier_html(POINTS, EVIL, f"vitcompress plan {EVIL}")
    assert_safe(html)
    seen = Seen(html)
    assert EVIL in seen.text
    assert "3.00 times fewer parameters 0.125 nats (knee)" in seen.text
    assert frontier_text(POINTS).count("times fewer") == 3
    assert "10,000,000 parameters" in seen.text
    assert "<pre>" not in frontier_html(POINTS, "m")


@pytest.mark.thorough
@needs_chromium
def test_chromium_shows_the_page_without_an_error(tmp_path: Path) -> None:
    shown = shown_by_chromium(frontier_html(POINTS, EVIL), tmp_path)
    assert "3,333,333" in shown
