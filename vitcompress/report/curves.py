"""Show the losses and the accuracy during a training: drawings as SVG, a table, and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcompress.distill.log import TrainLog
from vitcompress.report.rows import MEASURES, PERCENT, show_measure
from vitcompress.report.svg import draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#a66f00", "#56b4e9")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_MAX_ROWS = 8  # of the table


def curve_columns(train: TrainLog) -> list[str]:
    """Return the column heads of `curve_rows`: step, sum, the losses, learning rate."""
    return ["step", *(_label(name) for name in _loss_names(train)), "rate"]


def curve_rows(train: TrainLog) -> list[list[str]]:
    """Return a few points of the curve as table rows, including the first and the last."""
    points, names = train.loss_curve, _loss_names(train)
    count = min(_MAX_ROWS, len(points))
    chosen = [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]
    return [
        [
            f"{point.get('step', 0):,.0f}",
            *("–" if name not in point else f"{point[name]:.4g}" for name in names),
            f"{point['lr']:.3g}" if "lr" in point else "–",
        ]
        for point in chosen
    ]


def draw_curves(train: TrainLog) -> str:
    """Draw each loss over the steps, on a logarithmic axis if they differ by orders of magnitude.

    Args:
        train: a training with at least two points.

    Returns:
        SVG; the same for the same points and the same matplotlib.
    """
    names = _loss_names(train)

    def plot(axes: Axes) -> None:
        for number, name in enumerate(names):
            points = [(point["step"], point[name]) for point in train.loss_curve if name in point and "step" in point]
            steps, losses = zip(*points, strict=True) if points else ((), ())
            color, dash = _COLORS[number % len(_COLORS)], _DASHES[number % len(_DASHES)]
            axes.plot(steps, losses, color=color, linestyle=dash, linewidth=1.8, label=_label(name))
        values = [point[name] for point in train.loss_curve for name in names if name in point]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("weighted loss")
        for text in axes.legend(frameon=False, fontsize=9).get_texts():
            text.set_parse_math(False)

    return draw_svg((4.4, 3.2), plot)


def describe_curves(train: TrainLog) -> str:
    """Describe the drawing in a sentence with numbers."""
    first, last = train.loss_curve[0], train.loss_curve[-1]
    parts = [
        f"{_label(name)} from {first[name]:.4g} to {last[name]:.4g}"
        for name in _loss_names(train)
        if name in first and name in last
    ]
    return (
        f"Weighted losses from step {first.get('step', 0):.0f} to step {last.get('step', 0):.0f}: {'; '.join(parts)}."
    )


def accuracy_points(train: TrainLog) -> tuple[str, list[tuple[float, float]]]:
    """Return what was measured during a training: a key of `MEASURES`, and a value for each step.

    The key is empty and there are no values where nothing was measured.
    """
    name = next((name for name in MEASURES if any(name in point for point in train.accuracy_curve)), "")
    points = [(point["step"], point[name]) for point in train.accuracy_curve if {"step", name} <= point.keys()]
    return name, points


def draw_accuracy(train: TrainLog) -> str:
    """Draw the accuracy over the steps.

    Args:
        train: a training with at least two `accuracy_points`.

    Returns:
        SVG; the same for the same points and the same matplotlib.
    """
    name, points = accuracy_points(train)

    def plot(axes: Axes) -> None:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=_COLORS[1], marker="o", linewidth=1.8)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{MEASURES[name]}{' (%)' if name in PERCENT else ''}")

    return draw_svg((4.4, 2.4), plot)


def describe_accuracy(train: TrainLog) -> str:
    """Return a sentence on the accuracy during a training; empty where nothing was measured."""
    name, points = accuracy_points(train)
    if not points:
        return ""
    values = ", ".join(f"{show_measure(value, name)} at step {step:,.0f}" for step, value in points)
    images = train.accuracy_curve[0].get("images", 0)
    return f"During training, {MEASURES[name]} on {images:,.0f} of these images: {values}."


def _loss_names(train: TrainLog) -> list[str]:
    """Return the names of the logged losses, their sum first; empty if there is no curve."""
    names = dict.fromkeys(name for point in train.loss_curve for name in point if name not in ("step", "lr"))
    return sorted(names, key=lambda name: name != "loss")


def _label(name: str) -> str:
    return "sum" if name == "loss" else name
