"""Draw size against top-1 as SVG, one point for each model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vitcompress.report.model import Report
from vitcompress.report.svg import draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {"teacher": "#000000", "student": "#d55e00", "baseline": "#0072b2"}  # of Okabe and Ito's palette
_MARKERS = "os^vDph<>d"  # a different one for each model, so that nobody depends on color
_LEGEND_LINE = 0.2  # inches
_MAX_NAME = 34  # letters


class Point(NamedTuple):
    """A model in the picture.

    Attributes:
        name: shown in the legend.
        num_bytes: size of its tensors.
        top1: in percent; None if it was not measured.
        kind: `teacher`, `student` or `baseline`.
    """

    name: str
    num_bytes: int
    top1: float | None
    kind: str


def points_of(report: Report) -> list[Point]:
    """Return the models of a report whose top-1 was measured.

    In the report of a fine-tuned file, the teacher's size is that of the same model without
    sharing, which may not be the model whose accuracy was measured: it is left out unless the
    student learned from it.
    """
    accuracy, size = report.accuracy, report.size
    if accuracy is None:
        return []
    points = [Point("student", size.student_bytes, accuracy.student_top1, "student")]
    if not report.lineage or report.train.teacher == report.model:
        points.insert(0, Point("teacher", size.teacher_bytes, accuracy.teacher_top1, "teacher"))
    points += [Point(row.name, row.bytes, row.top1, "baseline") for row in report.baselines]
    return [point for point in points if point.top1 is not None]


def to_svg(report: Report) -> str | None:
    """Draw the models of a report; None if fewer than two have a top-1.

    Returns:
        SVG; the same for the same report and the same matplotlib.
    """
    points = points_of(report)
    return draw_sizes(points, report.model) if len(points) > 1 else None


def alt_text(points: Sequence[Point]) -> str:
    """Describe the picture in words and numbers, without Markdown's markup of images."""
    text = "; ".join(f"{point.name} {_numbers(point)}" for point in points)
    return f"Size against top-1: {text}.".translate(str.maketrans("[]\n", "() "))


def draw_sizes(points: Sequence[Point], title: str, size: tuple[float, float] = (7.2, 3.8)) -> str:
    """Draw size, on a logarithmic axis, against top-1.

    Args:
        points: at least two, each with its top-1.
        title: line above the picture.
        size: width and height in inches, at 72 dots per inch and without the legend.

    Returns:
        SVG; the same for the same points and the same matplotlib.
    """
    width, height = size
    columns = 2 if width > 6 and len(points) > 2 else 1
    height += _LEGEND_LINE * math.ceil(len(points) / columns)

    def plot(axes: Axes) -> None:
        axes.set_title(title, parse_math=False, fontsize=11)
        _lay_out(axes, points)
        for number, point in enumerate(points):
            axes.plot(
                _megabytes(point), point.top1 or 0.0, _MARKERS[number % len(_MARKERS)], color=_COLORS[point.kind],
                markersize=9, markeredgecolor="white", label=str(number),
                zorder=3 if point.kind == "baseline" else 4,  # teachers and students are in front
            )  # fmt: skip
        legend = axes.figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        for text, point in zip(legend.get_texts(), points, strict=True):  # labels like _name would be left out
            text.set_parse_math(False)
            text.set_text(f"{_shorten(point.name)}, {_numbers(point)}")

    return draw_svg((width, height), plot)


def _lay_out(axes: Axes, points: Sequence[Point]) -> None:
    """Set limits, ticks and labels, in place."""
    sizes = [_megabytes(point) for point in points]
    tops = [point.top1 or 0.0 for point in points]
    left, right = min(sizes), max(sizes)
    margin = max(1.2, (right / left) ** 0.1)
    left, right = left / margin, right * margin
    steps = (1, 2, 5) if right / left > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps if left <= step * 10.0**decade <= right]
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    room = max(0.1 * (max(tops) - min(tops)), 0.5)
    axes.set_ylim(min(tops) - room, max(tops) + room)
    axes.set_xlabel("size of the tensors (MB, logarithmic)")
    axes.set_ylabel("top-1 (%)")


def _megabytes(point: Point) -> float:
    return point.num_bytes / 1e6


def _numbers(point: Point) -> str:
    return f"{_megabytes(point):.2f} MB, {point.top1:.2f} %"


def _shorten(name: str) -> str:
    """Shorten a long name; its end is kept, which says more: `…quickgelu_224.openai`."""
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"
