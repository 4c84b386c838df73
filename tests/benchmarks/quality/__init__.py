"""Which method of compression is best, at equal size, images and steps?

Every method trains from the same teacher on the same views, each by the best of the same learning
rates, over seeds. The fast form compares on the built-in model, small; `--full` on all models and
sizes, which is for the background: what an interrupted run has done is not done again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.quality.measure import Comparison, Schedule
from tests.benchmarks.quality.methods import METHODS
from tests.benchmarks.quality.record import Results
from tests.benchmarks.quality.render import table, write
from tests.benchmarks.quality.subjects import SUBJECTS, Subject, load

FAST_MODELS, FAST_RATIOS = ("fashion_vit",), ("5", "smallest")
DOCS = Path(__file__).parents[3] / "docs"


def run(arguments: Sequence[str] = ()) -> str:
    """The tables of the models that were asked for.

    Args:
        arguments: what was typed after the benchmark's name.
    """
    asked = _parser().parse_args(list(arguments))
    torch.set_num_threads(asked.threads)
    results = Results(asked.results)
    models = asked.model or (list(SUBJECTS) if asked.full else list(FAST_MODELS))
    present = [model for model in models if _is_there(SUBJECTS[model])]
    if not asked.render_only:
        for model in present:
            subject = SUBJECTS[model]
            Comparison(subject, partial(load, subject), results).run(_schedule(subject, asked))
    folder = asked.out or (DOCS if asked.full else asked.results.parent)
    shown = models if asked.render_only else present
    page = write(folder, list(results.records.values()), shown, dict.fromkeys(shown, asked.steps))
    sys.stderr.write(f"wrote {page}\n")
    return "\n\n".join(f"### {model}\n{table(results.records.values(), model, asked.steps)}" for model in shown)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks quality", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all models, sizes and steps; hours")
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="this one alone; repeatable")
    parser.add_argument("--ratios", nargs="+", help="numbers like 2 or 5, or smallest")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD",
                        help="of " + ", ".join(METHODS))  # fmt: skip
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--choosing-steps", type=int, help="of those that the learning rate is chosen by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates to choose from")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--results", type=Path, default=Path("build/quality.jsonl"), help="JSON lines, one per run")
    parser.add_argument("--out", type=Path, help="folder of the table and the figures; docs of the full form")
    parser.add_argument("--render-only", action="store_true", help="run nothing")
    return parser


def _is_there(subject: Subject) -> bool:
    path = subject.missing()
    if path is not None:
        sys.stderr.write(f"{subject.model}: skipped, {path} is not here\n")
    return path is None


def _schedule(subject: Subject, asked: argparse.Namespace) -> Schedule:
    """What of a model is run: what was asked for, else what the form has."""
    steps = asked.steps or (subject.full_steps if asked.full else subject.fast_steps)
    return Schedule(
        methods=asked.methods,
        ratios=asked.ratios or (subject.ratios if asked.full else FAST_RATIOS),
        learning_rates=asked.lrs or subject.learning_rates,
        seeds=asked.seeds,
        steps=steps,
        choosing_steps=asked.choosing_steps or (steps if asked.full else max(1, steps // 3)),
    )
