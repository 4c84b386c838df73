"""Do predicted costs agree with what plans cost? Plans of several sizes and kinds are built.

Measured on validation images, which neither the options nor the starts are fitted to. What is in
`--out` is not run again, so that an interrupted run can continue:

    python -m tests.benchmarks predictions --subject imagenet --out FILE --plot FILE.svg
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks._lines import add_line, read_lines
from tests.benchmarks._subjects import SUBJECTS, ready
from tests.search.factories import search_of
from vitcompress.data.calibration import calibration_batches
from vitcompress.pipeline.run import Run
from vitcompress.recipe import KINDS
from vitcompress.recipe.compose import build
from vitcompress.report.svg import draw_svg
from vitcompress.search.candidates import find_candidates
from vitcompress.search.divergence import divergence
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import Search
from vitcompress.search.saved import load_options, save_options
from vitcompress.search.student import build_student

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CASES = [
    *((KINDS, ratio) for ratio in (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)),
    *((("narrow",), ratio) for ratio in (1.25, 1.6, 2.25, 2.75)),
    *((("low_rank",), ratio) for ratio in (1.25, 1.5, 2.0)),
    (("skip",), 1.5), (("adapter",), 1.5), (("share",), 1.25),
]  # fmt: skip
"""Kinds of options, and how many times fewer parameters."""
NUM_IMAGES = 400
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a66f00", "#56b4e9")


@dataclass(frozen=True)
class Line:
    """A plan, as a line of JSON.

    Attributes:
        subject: name in `SUBJECTS`.
        images: that options and starts are fitted to, and judged on.
        kinds: that the plan is chosen from; `used`: those that it uses.
        ratio: how many times fewer parameters.
        predicted: nats per image.
        measured: the same on the validation images, before any training.
    """

    subject: str
    images: int
    kinds: tuple[str, ...]
    used: tuple[str, ...]
    ratio: float
    predicted: float
    measured: float


def run(arguments: Sequence[str] = ()) -> str:
    """Return a table of all plans in the file, after those that are missing are built."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks predictions")
    parser.add_argument("--subject", default="imagenet", choices=list(SUBJECTS))
    parser.add_argument("--images", type=int, default=512, help="images to fit to")
    parser.add_argument("--out", type=Path, default=Path("build/predictions.jsonl"), help="JSON lines, one per plan")
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    given = parser.parse_args(list(arguments))
    for line in lines_of(given):
        add_line(given.out, line)
        sys.stderr.write(f"{line}\n")
    lines = read(given.out, given)
    if given.plot:
        given.plot.write_text(drawing(lines), encoding="utf-8")
    return table(lines)


def read(path: Path, given: argparse.Namespace) -> list[Line]:
    """Return the lines of a file that are of this subject and as many images."""
    return [line for line in read_lines(path, Line) if (line.subject, line.images) == (given.subject, given.images)]


def lines_of(given: argparse.Namespace) -> Iterator[Line]:
    """Build the plans that the file lacks, and yield their lines."""
    done = {(line.kinds, line.ratio) for line in read(given.out, given)}
    missing = [case for case in CASES if case not in done]
    if not missing:
        return
    flags = {**SUBJECTS[given.subject], "calibration_images": given.images, "share": 1, "width": 0.5}
    prepared, source = ready(build(flags))
    fitted, judged = (torch.cat(list(batches)) for batches in (prepared.calibration(), prepared.judged()))
    search = search_of(source, name=prepared.source.name, fitted=fitted, judged=judged, memory_bytes=8e9)
    measured = options_of(search, given.out.with_suffix(f".{given.subject}.{given.images}.json"))
    whole, images = sum(p.numel() for p in source.parameters()), new_images(prepared)
    for kinds, ratio in missing:
        of_kinds = replace(measured, shapes=replace(measured.shapes, kinds=kinds))
        best = find_candidates(of_kinds, math.floor(whole / ratio))[0]
        student = build_student(best.plan, source, search.fitted, weights=search.weights)
        cost = divergence(student, source, images)
        yield Line(given.subject, given.images, kinds, best.kinds, ratio, best.predicted, cost)


def options_of(search: Search, path: Path) -> MeasuredOptions:
    """Return the measured options of a file, which is written where it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_options(path, search.measure(KINDS, lambda done: None), {})
    return load_options(path, search.shapes(KINDS), {})


def new_images(run: Run) -> Tensor:
    """Return validation images, spread over their classes as far as these follow each other."""
    assert run.val is not None
    total = len(run.val)
    numbers = list(islice(range(0, total, max(1, total // NUM_IMAGES)), NUM_IMAGES))
    return torch.cat(list(calibration_batches(run.val.subset(numbers, "val"), run.config, run.recipe.data)))


def rank_correlation(lines: Sequence[Line]) -> float:
    """Return Spearman's rank correlation of predicted and measured costs."""
    predicted, measured = (
        np.argsort(np.argsort([getattr(x, name) for x in lines])) for name in ("predicted", "measured")
    )
    return float(np.corrcoef(predicted, measured)[0, 1])


def table(lines: Sequence[Line]) -> str:
    """Return a row per plan, and below how well predictions agree."""
    rows = ["| kinds | times fewer | predicted | measured | ratio |", "|---|---:|---:|---:|---:|"]
    rows += [
        f"| {', '.join(x.used)} | {x.ratio:g} | {x.predicted:.3f} | {x.measured:.3f} | {x.predicted / x.measured:.2f} |"
        for x in sorted(lines, key=lambda line: line.measured)
    ]
    ratios = [x.predicted / x.measured for x in lines]
    note = (
        f"{len(lines)} plans: rank correlation {rank_correlation(lines):.3f}; "
        f"predicted is {min(ratios):.2f} to {max(ratios):.2f} times measured."
    )
    return "\n".join([*rows, "", note])


def drawing(lines: Sequence[Line]) -> str:
    """Return a drawing of predicted against measured costs."""

    def plot(axes: Axes) -> None:
        ends = [0.6 * min(x.measured for x in lines), 1.6 * max(x.measured for x in lines)]
        axes.plot(ends, ends, "-", color="#000000", linewidth=1, label="equal")
        for factor, label in ((0.5, "within a factor of two"), (2.0, None)):
            axes.plot(ends, [factor * end for end in ends], ":", color="#000000", linewidth=1, label=label)
        groups = {", ".join(x.kinds) if x.kinds != KINDS else "all kinds": x.kinds for x in lines}
        for (name, kinds), color in zip(groups.items(), COLORS, strict=False):
            mine = [x for x in lines if x.kinds == kinds]
            axes.plot([x.predicted for x in mine], [x.measured for x in mine], "o", color=color, label=name)
        axes.set(xscale="log", yscale="log", xlabel="predicted cost (nats per image)")
        axes.set_ylabel("measured on new images")
        axes.legend(frameon=False, fontsize=8)

    return draw_svg((6.4, 4.6), plot)
