"""How small and how good, at a glance?  Size against top-1, one point per model, as SVG.

matplotlib is imported when something is drawn, and not before.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vitcompress.report.model import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_STYLES = {"teacher": ("#000000", "o"), "student": ("#d55e00", "s"), "baseline": ("#0072b2", "D")}  # Okabe and Ito's
_MARKER_POINTS = 7.0
_LONGEST_NAME = 34
_DISTANCES = (8, 20, 34, 48, 64, 82, 102, 124, 148)  # from a point to its label, in points of type
_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))


class Point(NamedTuple):
    """A model in the picture.

    Attributes:
        name: what it is called there.
        num_bytes: of its tensors.
        top1: in percent; None where it was not measured.
        kind: `teacher`, `student` or `baseline`.
    """

    name: str
    num_bytes: int
    top1: float | None
    kind: str


def points_of(report: Report) -> list[Point]:
    """The models that a report compares, those whose top-1 was measured.

    Of a fine-tuned file the teacher's size is that of the same model without sharing, which may not be the model whose
    accuracy was measured: it is left out unless the student learned from it.
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
    """What the picture shows, in words and numbers; nothing that Markdown would take for markup of an image."""
    text = "; ".join(f"{point.name} {_numbers(point)}" for point in points)
    return f"Size against top-1: {text}.".translate(str.maketrans("[]\n", "() "))


def draw_sizes(points: Sequence[Point], title: str, size: tuple[float, float] = (7.2, 4.4)) -> str:
    """Draw size, on a logarithmic axis, against top-1.

    Args:
        points: at least two, each with its top-1.
        title: the line above the picture.
        size: width and height in inches, of 72 points of type.

    Returns:
        SVG; the same for the same points and the same matplotlib.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    svg = io.StringIO()
    # a user's matplotlibrc must not change the picture, nor may random ids or the date
    with matplotlib.style.context(["default", {"svg.hashsalt": "vitcompress"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in another script: boxes will do
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, parse_math=False, fontsize=11)
        _lay_axes(axes, points)
        for point in points:
            colour, marker = _STYLES[point.kind]
            above = 3 if point.kind == "baseline" else 4  # what the report is about is not hidden
            axes.plot(
                _megabytes(point), point.top1 or 0.0, marker, color=colour, markersize=_MARKER_POINTS,
                markeredgecolor="white", zorder=above,
            )  # fmt: skip
        figure.draw_without_rendering()  # settles the layout, which labels are placed in
        figure.set_layout_engine("none")
        _place_labels(axes, points)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def _lay_axes(axes: Axes, points: Sequence[Point]) -> None:
    """Give the axes limits with room for labels, plain numbers and a light grid, in place."""
    sizes = [_megabytes(point) for point in points]
    tops = [point.top1 or 0.0 for point in points]
    left, right = min(sizes), max(sizes)
    margin = max(1.5, (right / left) ** 0.25)
    left, right = left / margin, right * margin
    steps = (1, 2, 5) if right / left > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps if left <= step * 10.0**decade <= right]
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    room = max(0.2 * (max(tops) - min(tops)), 0.5)
    axes.set_ylim(min(tops) - room, max(tops) + room)
    axes.set_xlabel("size of the tensors (MB, logarithmic)")
    axes.set_ylabel("top-1 (%)")
    axes.grid(color="#e0e0e0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Write name and numbers beside each point, in place, where nothing lies yet; farther away a line leads there."""
    from matplotlib.transforms import Bbox

    places = [axes.transData.transform((_megabytes(point), point.top1 or 0.0)) for point in points]
    taken = [Bbox([place, place]).padded(_MARKER_POINTS / 2 + 1) for place in places]
    inside = axes.get_window_extent()
    lines: list[list[tuple[float, float]]] = []
    for point, place in zip(points, places, strict=True):
        tried: list[Any] = []
        for away, (dx, dy) in itertools.product(_DISTANCES, _AROUND):
            label = _label(axes, point, away * dx, away * dy)
            box = label.get_window_extent()
            label.remove()
            steps = [away * part / 20 for part in range(21)]  # at 72 dpi a pixel is a point of type
            line = [(place[0] + step * dx, place[1] + step * dy) for step in steps]
            faults = 3 * sum(box.overlaps(other) for other in taken) + 9 * (not _within(box, inside))
            faults += sum(_crosses(other, box) for other in lines)
            faults += sum(_crosses(line, other) for other in taken[len(points) :])
            tried.append((faults, len(tried), away * dx, away * dy, box, line))
            if not faults:
                break
        _, _, dx, dy, box, line = min(tried, key=lambda each: each[:2])
        far = max(abs(dx), abs(dy)) > _DISTANCES[0]
        _label(axes, point, dx, dy, line=far)
        taken.append(box)
        lines += [line] if far else []


def _label(axes: Axes, point: Point, dx: float, dy: float, *, line: bool = False) -> Annotation:
    """Write the label of a point so many points of type right of it and above it, and draw a line to it if asked."""
    return axes.annotate(
        f"{_short(point.name)}\n{_numbers(point)}",
        (_megabytes(point), point.top1 or 0.0),
        (dx, dy),
        textcoords="offset points",
        ha={1: "left", 0: "center", -1: "right"}[(dx > 0) - (dx < 0)],
        va={1: "bottom", 0: "center", -1: "top"}[(dy > 0) - (dy < 0)],
        color=_STYLES[point.kind][0],
        fontsize=9,
        parse_math=False,
        # only for the label that is kept: with a line to the point, its extent would cover the point
        arrowprops={"arrowstyle": "-", "color": "#909090", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        if line
        else None,
    )


def _crosses(line: Sequence[tuple[float, float]], box: Bbox) -> bool:
    """Whether a line, as the points along it, runs through a box."""
    return any(box.contains(x, y) for x, y in line)


def _within(box: Bbox, frame: Bbox) -> bool:
    return bool(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)


def _megabytes(point: Point) -> float:
    return point.num_bytes / 1e6


def _numbers(point: Point) -> str:
    return f"{_megabytes(point):.2f} MB, {point.top1:.2f} %"


def _short(name: str) -> str:
    """A name that fits into the picture; of a long one the end says more: `…quickgelu_224.openai`."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
