"""Which learning rate is best for which start? A grid for near and far starts, 200 steps each.

The built-in model, and DeiT-Tiny on two sets of images where these are there; narrow, low-rank and
shared students. What is in `--out` is not run again, so that an interrupted run can continue:

    python -m tests.benchmarks learning_rate --starts caltech-width0.25 --lrs 1e-4 4e-4
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import vitcompress
from tests.benchmarks._lines import add_line, read_lines
from tests.benchmarks._subjects import SUBJECTS, ready
from vitcompress.distill.optimizers import lr_for_start
from vitcompress.recipe import Recipe
from vitcompress.recipe.compose import build
from vitcompress.search.divergence import divergence_and_chance

FACTOR, REACH = 1.5, 3  # between neighbors of the grid; neighbors on each side of its center
NEAR, HALFWAY, FAR = 1e-4, 2.25e-4, 7.6e-4  # centers of the grid


class Settings(NamedTuple):
    """What the runs of a grid have in common.

    Attributes:
        start: name in `STARTS`.
        steps: of training.
        batch_size: images per step.
        seed: of calibration images, order and views.
        calibration_images: that the start is fitted to; None for the product's default.
    """

    start: str
    steps: int
    batch_size: int
    seed: int
    calibration_images: int | None


class Start(NamedTuple):
    """A start: which model, in which plan, and the center of its grid."""

    subject: str
    plan: Mapping[str, Any]
    center: float = HALFWAY


STARTS: Mapping[str, Start] = {
    "fashion-width0.5": Start("fashion", {"share": 1, "width": 0.5}, NEAR),
    "fashion-rank32": Start("fashion", {"share": 1, "adapter_rank": 32, "matrices": False}, NEAR),
    "fashion-rank12": Start("fashion", {"share": 1, "adapter_rank": 12, "matrices": False}),
    "fashion-share2": Start("fashion", {"share": 2}),
    "fashion-share12": Start("fashion", {"share": 12}, FAR),
    "fashion-width0.25": Start("fashion", {"share": 1, "width": 0.25}, FAR),
    **{
        f"{subject}-width{width}": Start(subject, {"share": 1, "width": width})
        for subject in ("imagenet", "caltech")
        for width in (0.5, 0.375, 0.25)
    },
}  # fmt: skip
BUILT_IN = [name for name, start in STARTS.items() if start.subject == "fashion"]


@dataclass(frozen=True)
class Line:
    """A run, as a line of JSON.

    Attributes:
        start, steps, batch_size, seed, calibration_images: as in `Settings`.
        lr: peak learning rate.
        divergence: of the start from the source on images that it was not fitted to, in nats.
        chance: the same of predictions that ignore the image.
        width: channels of the model.
        num_images: number of training images.
        top1_before: before training, in percent.
        top1: after it.
        kl: from the source after it, on the same images as top-1, in nats.
        source_top1: of the source.
    """

    start: str
    lr: float
    steps: int
    batch_size: int
    seed: int
    calibration_images: int | None
    divergence: float
    chance: float
    width: int
    num_images: float
    top1_before: float
    top1: float
    kl: float
    source_top1: float

    @property
    def settings(self) -> Settings:
        """What it has in common with the other runs of its grid."""
        return Settings(self.start, self.steps, self.batch_size, self.seed, self.calibration_images)


def run(arguments: Sequence[str] = ()) -> str:
    """The table of all runs in the file, those that are missing run before.

    Args:
        arguments: what was typed after the benchmark's name.
    """
    asked = _parser().parse_args(list(arguments))
    for name in asked.starts:
        missing = next((path for path in _files(name) if not path.exists()), None)
        if missing is not None:
            sys.stderr.write(f"{name}: skipped, there is no {missing}\n")
            continue
        for line in lines_of(name, asked):
            add_line(asked.out, line)
            sys.stderr.write(f"{name}, learning rate {line.lr:.3g}: {line.top1_before:.2f} → {line.top1:.2f} %\n")
    return table(read_lines(asked.out, Line))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks learning_rate")
    parser.add_argument("--starts", nargs="+", default=BUILT_IN, choices=list(STARTS), metavar="START",
                        help="some of: " + ", ".join(STARTS))  # fmt: skip
    parser.add_argument("--lrs", type=float, nargs="+", help=f"default: a grid of factor {FACTOR} for each start")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration-images", type=int, help="that starts are fitted to; default: the product's")
    parser.add_argument("--num-workers", default="auto", help="of the data loaders")
    parser.add_argument("--out", type=Path, default=Path("build/learning_rate.jsonl"), help="JSON lines, one per run")
    return parser


def _files(name: str) -> list[Path]:
    """What a start needs."""
    flags = SUBJECTS[STARTS[name].subject]
    return [Path(flags[key]) for key in ("checkpoint", "data") if key in flags]


def grid(center: float) -> list[float]:
    """Learning rates around a center, to three digits, so that they are found again in a file."""
    return [float(f"{center * FACTOR**step:.2e}") for step in range(-REACH, REACH + 1)]


def recipe_of(name: str, asked: argparse.Namespace, **more: Any) -> Recipe:
    """The recipe of a start."""
    start = STARTS[name]
    flags = {
        **SUBJECTS[start.subject], **start.plan, "steps": asked.steps, "batch_size": asked.batch_size,
        "seed": asked.seed, "num_workers": asked.num_workers, "baselines": False, "save_every": "none",
        "refine": 0, **more,
    }  # fmt: skip
    if asked.calibration_images:
        flags["calibration_images"] = asked.calibration_images
    return build(flags)


def lines_of(name: str, asked: argparse.Namespace) -> Iterator[Line]:
    """Run what the file has not, and yield its lines."""
    settings = Settings(name, asked.steps, asked.batch_size, asked.seed, asked.calibration_images)
    known = [line for line in read_lines(asked.out, Line) if line.settings == settings]
    done = {line.lr for line in known}
    before = known[0] if known else None
    for lr in asked.lrs or grid(STARTS[name].center):
        if lr in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            before = before or measure_start(name, asked, Path(folder) / "start.safetensors")
            report = vitcompress.compress(recipe_of(name, asked, lr=lr), Path(folder) / "trained.safetensors")
        accuracy: Any = report.accuracy
        yield replace(before, lr=lr, top1=accuracy.student_top1, kl=accuracy.kl)


def measure_start(name: str, asked: argparse.Namespace, path: Path) -> Line:
    """Measure a start, as the rule for the learning rate sees it; `lr` is 0.

    Args:
        name: of the start.
        asked: the options.
        path: file to write it to.
    """
    recipe = recipe_of(name, asked, steps=0)
    accuracy: Any = vitcompress.compress(recipe, path).accuracy
    run, source = ready(recipe)
    student = vitcompress.load(path).to(run.accelerator.device)
    nats, chance = divergence_and_chance(student, source, torch.cat(list(run.judged())))
    width: Any = source.num_features
    return Line(
        name, 0.0, asked.steps, asked.batch_size, asked.seed, asked.calibration_images, nats, chance, width,
        run.num_images, accuracy.student_top1, accuracy.student_top1, accuracy.kl, accuracy.teacher_top1,
    )  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """A row per start: how far it is, the rule's learning rate, the best one, and top-1 of all."""
    rows = [
        "| start | KL | of chance | before | by the rule | best | top-1 by learning rate |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for settings in dict.fromkeys(line.settings for line in lines):
        its = sorted((line for line in lines if line.settings == settings), key=lambda line: line.lr)
        first, best = its[0], max(its, key=lambda line: line.top1)
        rule = lr_for_start(
            first.divergence, first.chance, first.batch_size, first.width, first.num_images, trained=False
        )
        shown = ", ".join(f"{line.lr:.3g}: {line.top1:.2f}" for line in its)
        rows.append(
            f"| {first.start} | {first.divergence:.3f} | {first.chance:.2f} | {first.top1_before:.2f} % | {rule:.2g} "
            f"| {best.lr:.3g} | {shown} |"
        )
    return "\n".join(rows)
