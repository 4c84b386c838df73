"""What do the records say?  A table in Markdown and a figure, from them alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.quality.methods import METHODS, SMALLEST, WHOLE
from tests.benchmarks.quality.record import Record, Row, summarise
from vitcompress.artifact.atomic import replacing

_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#999999")  # Okabe and Ito's
POINTS_SHOWN = 30.0  # of top-1, below the best, where half of the students are within that
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def table(records: Iterable[Record], model: str, steps: int | None = None) -> str:
    """The table of a model, the smallest students last.

    Args:
        records: of any models.
        model: to be shown.
        steps: length of the trainings shown; None for the longest there is.
    """
    records = list(records)
    rows = sorted(summarise(records, model, steps), key=_place)
    if not rows:
        return f"Nothing of {model} has been measured."
    lines = [
        "| size | method | parameters | MB | MMACs | top-1 at the start | top-1 after | spread | agreement | lr |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(_line(row) for row in rows),
    ]
    trained = [row.record for row in rows if row.record.steps]
    notes = []
    if trained:
        seeds = max(len(row.top1) for row in rows)
        notes.append(
            f"{trained[0].steps} steps of {trained[0].batch_size} images; {seeds} seed{'s' * (seeds > 1)}: the mean, "
            "and as spread the largest minus the smallest; each method by the best of the same learning rates, found "
            "at the first seed on images held out of training. Sizes are those of shared matrices, and no other "
            "method may have more parameters."
        )
    few = [row for row in rows if row.record.steps and len(row.top1) < max(len(row.top1) for row in rows)]
    notes += [f"{_size(row.record)}, {row.record.method}: {len(row.top1)} seed(s) only." for row in few]
    notes += [f"{_size(row.record)}, {row.record.method}: diverged." for row in rows if row.record.diverged]
    notes += [
        f"{_size(record)}, {record.method}: none, {record.unfit}."
        for record in records
        if record.model == model and record.unfit
    ]
    used = dict.fromkeys(row.record.method for row in rows)
    legend = [f"- **{name}**: {METHODS[name].about}" for name in METHODS if name in used]
    return "\n".join([*lines, "", *legend, "", *(f"{note}\n" for note in notes)]).rstrip()


def _line(row: Row) -> str:
    record = row.record
    cells = [
        _size(record), record.method, f"{record.num_params:,}", f"{record.num_bytes / 1e6:.2f}",
        f"{record.macs / 1e6:,.1f}", f"{row.start_top1:.2f} %", f"{row.mean:.2f} %" if record.steps else "",
        f"{row.spread:.2f}" if record.steps else "", f"{row.agreement:.2f} %", f"{record.lr:g}" if record.steps else "",
    ]  # fmt: skip
    if not record.steps:  # what is not trained starts at the teacher, and only its storing changes it
        cells[5], cells[6] = "", f"{row.mean:.2f} %"
    return f"| {' | '.join(cells)} |"


def _size(record: Record) -> str:
    return {WHOLE: "whole", SMALLEST: SMALLEST}.get(record.ratio, f"{record.ratio}×")


def _place(row: Row) -> tuple[float, int]:
    ratio = float("inf") if row.record.ratio == SMALLEST else float(row.record.ratio)
    return ratio, list(METHODS).index(row.record.method)


def figure(records: Iterable[Record], model: str, steps: int | None = None) -> str:
    """Bytes against top-1, a line per method, bars from the worst seed to the best; SVG.

    What is far below the best is left to the table: a random start would press all others into one
    line.

    Args:
        records: of any models.
        model: to be shown.
        steps: length of the trainings shown; None for the longest there is.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    rows: dict[str, list[Row]] = {}
    for row in sorted(summarise(records, model, steps), key=_place):
        rows.setdefault(row.record.method, []).append(row)
    svg = io.StringIO()
    with matplotlib.style.context(["default", {"svg.hashsalt": "vitcompress"}]):
        drawn = Figure(figsize=(8.4, 4.8), dpi=72, layout="constrained")
        axes = drawn.add_subplot()
        for number, name in enumerate(name for name in METHODS if name in rows):
            means = [row.mean for row in rows[name]]
            bars = [
                [row.mean - min(row.top1) for row in rows[name]],
                [max(row.top1) - row.mean for row in rows[name]],
            ]  # fmt: skip
            axes.errorbar(
                [row.record.num_bytes / 1e6 for row in rows[name]], means, yerr=bars, label=name, capsize=3,
                color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[(number + number // 8) % len(_MARKERS)],
                linestyle=("-", "--")[number // len(_COLOURS) % 2], linewidth=1,
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5)]
        left, right = axes.get_xlim()
        axes.set_xticks([tick for tick in ticks if left <= tick <= right])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xticks([], minor=True)
        means = [row.mean for method in rows.values() for row in method]
        lowest = max(means, default=0.0) - POINTS_SHOWN
        near = sum(mean >= lowest for mean in means)
        if 2 * near >= len(means):  # else most of what is to be compared would be cut off
            axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest))
        axes.set_xlabel("size of the tensors (MB, logarithmic)")
        axes.set_ylabel("top-1 (%)")
        axes.set_title(f"{model}: size against top-1", parse_math=False, fontsize=11)
        axes.grid(color="#e0e0e0", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if rows:
            drawn.legend(loc="outside right upper", fontsize=9)
        drawn.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def write(folder: Path, records: Sequence[Record], models: Iterable[str], steps: Mapping[str, int | None]) -> Path:
    """Write each model's table and figure to the page `benchmarks.md`; returns the page.

    Args:
        folder: need not exist; nor need the page.
        records: of any models.
        models: to be shown.
        steps: length of the trainings shown, by model; None for the longest there is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "benchmarks.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Measurements\n"
    for model in models:
        picture = folder / f"quality-{model}.svg"
        with replacing(picture) as beside:
            beside.write_text(figure(records, model, steps.get(model)), encoding="utf-8")
        body = f"![{model}: size against top-1, by method]({picture.name})\n\n{table(records, model, steps.get(model))}"
        text = replace_section(text, model, body)
    with replacing(page) as beside:
        beside.write_text(text, encoding="utf-8")
    return page


def replace_section(text: str, model: str, body: str) -> str:
    """Return the page with `body` between the markers of `model`, which are appended if missing."""
    first, last = f"<!-- quality {model} -->", f"<!-- end of quality {model} -->"
    section = f"{first}\n{body}\n{last}"
    if first not in text or last not in text:
        return f"{text.rstrip()}\n\n## Methods on {model}\n{section}\n"
    return text.partition(first)[0] + section + text.partition(last)[2]
