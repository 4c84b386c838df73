"""What does a training gain from other settings, per second of processor time?

Variants train the same start, unless they change that. In folders, accuracy is measured on a tenth
of the training images, held out from training, so that validation images stay new; where the source
was trained on them, it looks better than it is. Lines are added to `--out`, and what is there is
not run again:

    python -m tests.benchmarks minutes --start caltech-width0.25 --variants "" "mixup=0.5"
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from torch import nn

from tests.benchmarks._lines import add_line, read_lines
from tests.benchmarks._subjects import SUBJECTS, ready
from tests.benchmarks.learning_rate import STARTS
from vitcompress.initialize.align import align_model
from vitcompress.pipeline.run import Run
from vitcompress.pipeline.start import make_student
from vitcompress.pipeline.train import train
from vitcompress.recipe import StartRecipe
from vitcompress.recipe.compose import build

DEFAULTS: Mapping[str, Any] = {"lr": 3.5e-4, "steps": 200, "batch_size": 32, "refine": 200}


@dataclass(frozen=True)
class Line:
    """A run, as a line of JSON.

    Attributes:
        start: name of the start.
        variant: settings that differ, as typed.
        seed: of the images' order, their views, and the images held out.
        steps: of the training.
        seconds: processor time of the training.
        top1_before: of the start, in percent.
        top1: after the training.
        kl: from the source after it, in nats.
    """

    start: str
    variant: str
    seed: int
    steps: int
    seconds: float
    top1_before: float
    top1: float
    kl: float


def run(arguments: Sequence[str] = ()) -> str:
    """Return the table of all runs in the file, those that are missing run before."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks minutes")
    parser.add_argument("--start", default="fashion-share2", choices=list(STARTS))
    parser.add_argument("--variants", nargs="+", default=[""], help='settings as "key=value key=value"; "" for none')
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("build/minutes.jsonl"), help="JSON lines, one per run")
    asked = parser.parse_args(list(arguments))
    known = {(line.start, line.variant, line.seed) for line in read_lines(asked.out, Line)}
    for seed in asked.seeds:
        starts: dict[StartRecipe, nn.Module] = {}
        for variant in asked.variants:
            if (asked.start, variant, seed) in known:
                continue
            given, source = _prepared(asked, variant, seed)
            how = given.recipe.start
            if how not in starts:
                starts[how] = make_student(given, source)[0]
            line = _trained(given, source, copy.deepcopy(starts[how]), asked.start, variant)
            add_line(asked.out, line)
            sys.stderr.write(f"{variant or 'default'}: {line.top1_before:.2f} → {line.top1:.2f} %\n")
    return table(read_lines(asked.out, Line))


def _prepared(asked: argparse.Namespace, variant: str, seed: int) -> tuple[Run, nn.Module]:
    """Return the request of a variant, and the source."""
    start = STARTS[asked.start]
    flags: dict[str, Any] = {**SUBJECTS[start.subject], **start.plan}
    if "data" in flags:
        flags["data"] = str(Path(flags["data"]) / "train")  # a tenth of it is held out
    flags |= {**DEFAULTS, "seed": seed, "num_workers": 0, "baselines": False, "save_every": "none"}
    flags |= {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in variant.split())}
    return ready(build(flags), judges=False)


def _trained(given: Run, source: nn.Module, student: nn.Module, start: str, variant: str) -> Line:
    before, began = _accuracy(given, student, source), time.process_time()
    log = train(given, student, align_model(source, given.plan), reference=source)
    seconds, after = time.process_time() - began, _accuracy(given, student, source)
    seed = given.recipe.run.seed
    return Line(start, variant, seed, log.steps, seconds, before.student_top1, after.student_top1, after.kl)


def _accuracy(given: Run, student: nn.Module, source: nn.Module) -> Any:
    return given.evaluator(student.eval(), source)


def table(lines: Sequence[Line]) -> str:
    """Return a row per start and variant, the seeds' mean and range."""
    rows = [
        "| start | settings | steps | seconds | before | top-1 | KL | seeds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.start, line.variant].append(line)
    for (start, variant), its in groups.items():
        top1 = [line.top1 for line in its]
        spread = f" ({min(top1):.2f}–{max(top1):.2f})" if len(its) > 1 else ""
        rows.append(
            f"| {start} | {variant or 'default'} | {its[0].steps} | {mean(line.seconds for line in its):.0f} "
            f"| {mean(line.top1_before for line in its):.2f} % | {mean(top1):.2f} %{spread} "
            f"| {mean(line.kl for line in its):.3f} | {len(its)} |"
        )
    return "\n".join(rows)
