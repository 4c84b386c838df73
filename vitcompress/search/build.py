"""Build the students of the most promising candidates, and measure how well they start."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from vitcompress.initialize.align import align_model
from vitcompress.initialize.start import start_student
from vitcompress.plans.model import Plan
from vitcompress.search.candidates import Candidate, even_widths, find_candidates
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.model import Search
from vitcompress.search.sensitivity import CHUNK_IMAGES, divergence
from vitcompress.surgery import apply_plan

MAX_BUILT = 3


def build_best(
    measured: MeasuredOptions,
    search: Search,
    budget: int,
    tell: Callable[[float], None],
    fits: Callable[[Plan], bool] = lambda plan: True,
) -> list[Candidate]:
    """Find candidates within a budget, build the most promising, and even out the best.

    Args:
        measured: the options and their costs.
        search: what the search works on.
        budget: maximum number of parameters of the student.
        tell: called with the share of this that is done, 0–1.
        fits: whether a plan is acceptable.

    Returns:
        The acceptable candidates, best first; only the first few are built.
    """
    candidates = [candidate for candidate in find_candidates(measured, budget) if fits(candidate.plan)]
    parts = min(MAX_BUILT, len(candidates)) + 1
    built: list[Candidate] = []
    for candidate in candidates[:MAX_BUILT]:
        built.append(build_candidate(candidate, search))
        tell(len(built) / parts)
    if built:
        best = min(built, key=lambda candidate: candidate.cost)
        built += _even_best(best, measured, search, budget, part_of(tell, len(built) / parts, 1.0), fits)
    return sorted(built, key=lambda candidate: candidate.cost) + candidates[MAX_BUILT:]


def _even_best(
    best: Candidate,
    measured: MeasuredOptions,
    search: Search,
    budget: int,
    tell: Callable[[float], None],
    fits: Callable[[Plan], bool],
) -> list[Candidate]:
    """Build ever more even plans for as long as that helps; return the best, or nothing."""
    evenest = best
    for number in itertools.count(1):
        plan = even_widths(best.plan, measured.shapes, budget, 0.5**number)
        if plan is None or not fits(plan):
            break
        candidate = build_candidate(Candidate(f"{best.name}, evened", plan, math.nan), search)
        tell(1 - 0.5**number)
        if candidate.cost >= evenest.cost:
            break
        evenest = candidate
    return [] if evenest is best else [evenest]


def build_candidate(candidate: Candidate, search: Search) -> Candidate:
    """Build a candidate's student and return the candidate with the cost of its start."""
    student = build_student(candidate.plan, search.teacher, search.fitted)
    return replace(candidate, cost=divergence(student, search.teacher, search.held_out))


def build_student(plan: Plan, teacher: nn.Module, images: Tensor) -> nn.Module:
    """Build the student of a plan with its starting weights, in eval mode.

    Args:
        plan: of the teacher.
        teacher: in eval mode; not changed.
        images: for calibration, `[B, C, H, W]`.
    """
    source = align_model(teacher, plan)
    student = copy.deepcopy(source)
    apply_plan(student, plan)
    start_student(student, source, plan, lambda: images.split(CHUNK_IMAGES), "calibrated")
    return student.eval()


def build_work(search: Search) -> float:
    """Estimate the time to build a student, in options that take as long to measure.

    An option fits one part of a block to some images; a student is both parts of all blocks, fitted
    to all images.
    """
    return 2 * len(search.blocks) * len(search.fitted) / len(search.option_images)


def best_work(search: Search) -> float:
    """Estimate the time that `build_best` takes, in options that take as long to measure."""
    return (MAX_BUILT + 1) * build_work(search)  # one for the rounds of evening


def part_of(tell: Callable[[float], None], first: float, last: float) -> Callable[[float], None]:
    """Return a function to call with the share of one part of the work that is done, 0–1.

    Args:
        tell: called with the share of the whole work that is done.
        first: that share when the part begins.
        last: that share when the part ends.
    """
    return lambda done: tell(min(last, first + (last - first) * done))
