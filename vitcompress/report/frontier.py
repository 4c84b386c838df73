"""Show the best plans for many budgets: as table, JSON, drawing and HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from rich.console import Console

from vitcompress.report.render import render
from vitcompress.report.rows import megabytes
from vitcompress.report.svg import draw_panels, inline_svg
from vitcompress.report.terminal import print_lines, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vitcompress.search.frontier import FrontierPoint

COLUMNS = ("ratio", "parameters", "bytes", "MACs", "nats", "kinds", "")
LEGEND = (
    "Ratio: how many times fewer parameters. Nats per image: predicted cost before any training, the KL divergence "
    "from the model's predictions. Knee: below it, each parameter that is left out costs more than on average."
)
_SIZE = (10.8, 3.9)  # of the drawing, in inches
_NARROW_SIZE = (9.6, 3.9)
_COLORS = {"line": "#0072b2", "common": "#0072b2", "knee": "#d55e00"}  # of Okabe and Ito's palette
_DECADES = 5  # of costs that are drawn; smaller ones are next to nothing


def frontier_json(points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """Return the points as plain JSON values, most parameters first."""
    return [
        {
            "target_ratio": round(point.target_ratio, 4), "ratio": point.size.params_ratio,
            "params": point.size.student_params, "bytes": point.size.student_bytes, "macs": point.size.student_macs,
            "predicted_nats": point.predicted_nats, "kinds": list(point.kinds), "common_target": point.is_common,
            "knee": point.is_knee,
        }
        for point in points
    ]  # fmt: skip


def frontier_rows(points: Sequence[FrontierPoint]) -> list[tuple[str, ...]]:
    """Return a row of cells for each point, for `COLUMNS`."""
    return [
        (
            f"{point.size.params_ratio:.2f}×", f"{point.size.student_params:,}", megabytes(point.size.student_bytes),
            _operations(point), f"{point.predicted_nats:.2g}", ", ".join(point.kinds) or "–", _remark(point),
        )
        for point in points
    ]  # fmt: skip


def print_frontier(points: Sequence[FrontierPoint], name: str, console: Console) -> None:
    """Print the points as a table.

    Args:
        points: from `pipeline.plan.frontier`.
        name: name of the model.
        console: console to print on.
    """
    console.print(_title(points, name), style="bold", markup=False, emoji=False, highlight=False)
    print_table(COLUMNS, frontier_rows(points), console)
    print_lines([LEGEND], console)


def frontier_svg(points: Sequence[FrontierPoint], name: str, size: tuple[float, float] = _SIZE) -> str:
    """Draw cost against parameters, bytes and multiply-accumulates, side by side.

    Args:
        points: at least one.
        name: name of the model; empty for a drawing without a title.
        size: width and height in inches, at 72 dots per inch.

    Returns:
        SVG; the same for the same points and the same matplotlib.
    """
    panels: list[tuple[str, Callable[[FrontierPoint], float]]] = [
        ("parameters (millions)", lambda point: point.size.student_params / 1e6),
        ("bytes (MB)", lambda point: point.size.student_bytes / 1e6),
    ]
    if all(point.size.student_macs for point in points):
        unit, divisor = ("G", 1e9) if max(point.size.student_macs or 0 for point in points) >= 1e9 else ("M", 1e6)
        panels.append((f"multiply-accumulates ({unit})", lambda point: (point.size.student_macs or 0) / divisor))

    def plot(axes: Axes, number: int) -> None:
        label, amount = panels[number]
        _draw(axes, points, amount)
        axes.set_xlabel(label)
        if number == 0:
            axes.set_ylabel("predicted cost (nats per image)")
            if name:
                axes.figure.suptitle(name, parse_math=False, fontsize=11)
            axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)

    def panel(number: int) -> Callable[[Axes], None]:
        return lambda axes: plot(axes, number)

    return draw_panels(size, [panel(number) for number in range(len(panels))])


def frontier_html(points: Sequence[FrontierPoint], name: str, command: str = "") -> str:
    """Return the drawing and the table as one HTML page that loads nothing and runs nothing.

    Args:
        points: at least one.
        name: name of the model.
        command: the command as typed; empty if there was none.
    """
    drawing = inline_svg(frontier_svg(points, "", _NARROW_SIZE), "frontier", "Cost against size", frontier_text(points))
    return render(
        "frontier.html.j2", title=_title(points, name), plot=Markup(drawing), columns=COLUMNS,
        rows=frontier_rows(points), legend=LEGEND, command=command,
    )  # fmt: skip


def frontier_text(points: Sequence[FrontierPoint]) -> str:
    """Describe the drawing in words and numbers."""
    named = [point for point in points if _remark(point)]
    parts = [
        f"{point.size.params_ratio:.2f} times fewer parameters {point.predicted_nats:.3g} nats"
        f"{' (knee)' if point.is_knee else ''}"
        for point in named
    ]
    return f"Predicted cost: {'; '.join(parts)}."


def _title(points: Sequence[FrontierPoint], name: str) -> str:
    whole = points[0].size.teacher_params if points else 0
    return f"{name}, {whole:,} parameters: predicted cost of the best plans"


def _remark(point: FrontierPoint) -> str:
    return ", ".join(word for word, is_true in (("target", point.is_common), ("knee", point.is_knee)) if is_true)


def _operations(point: FrontierPoint) -> str:
    macs = point.size.student_macs
    return "–" if macs is None else f"{macs / 1e9:.3g} G" if macs >= 1e9 else f"{macs / 1e6:.3g} M"


def _draw(axes: Axes, points: Sequence[FrontierPoint], amount: Callable[[FrontierPoint], float]) -> None:
    """Draw one panel, in place."""
    highest = max(max(point.predicted_nats for point in points), 1e-9)
    lowest = max(min(point.predicted_nats for point in points), highest / 10**_DECADES)

    def cost(point: FrontierPoint) -> float:
        return float(max(point.predicted_nats, lowest / 10))  # below the axis, which has no zero

    line = sorted(points, key=amount)
    axes.plot(list(map(amount, line)), list(map(cost, line)), "-", color=_COLORS["line"], linewidth=1.4)
    groups = (
        ("other budgets", [p for p in points if not p.is_common and not p.is_knee], "o", "line", 4),
        ("common targets", [p for p in points if p.is_common], "s", "common", 7),
        ("knee", [p for p in points if p.is_knee], "*", "knee", 15),
    )
    first = not axes.get_subplotspec() or axes.get_subplotspec().colspan.start == 0  # type: ignore[union-attr]
    for label, marked, marker, color, size in groups:
        if marked:
            axes.plot(
                list(map(amount, marked)), list(map(cost, marked)), marker, color=_COLORS[color],
                markersize=size, markeredgecolor="white", label=label if first else None, linestyle="none",
            )  # fmt: skip
    for point in points:
        if point.is_common:
            axes.annotate(
                f"{point.target_ratio:g}×", (amount(point), cost(point)), (5, 4), textcoords="offset points",
                fontsize=8, annotation_clip=True,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(lowest / 2, highest * 2)
    axes.set_xlim(0, 1.15 * max(map(amount, points)))
