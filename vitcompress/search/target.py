"""Find the best plan for a target: a ratio, a size, or a drop.

A ratio or a size sets a budget; for a drop, the smallest budget is searched for.

measure    what every option costs alone
allocate   the cheapest sum of options within the budget
build      the students of the best candidates, and the cost of their starts
even       the best of them with more even widths
"""

from __future__ import annotations

import math
from collections.abc import Callable

from vitcompress.errors import PlanError
from vitcompress.recipe import TargetRecipe
from vitcompress.search.build import MAX_BUILT, best_work, build_best, build_student, build_work, part_of
from vitcompress.search.candidates import smallest_plan
from vitcompress.search.file_size import budgets_work, check_rest, reach_size
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.model import Chosen, Search, choose

DROP_ROUNDS = 7


def reach(target: TargetRecipe, search: Search) -> Chosen:
    """Find the best plan for a target.

    Args:
        target: a ratio, a size or a drop.
        search: the teacher, its images and what is given of the student.

    Raises:
        PlanError: the target is out of reach; the hint names one that is not.
    """
    if target.target_size is not None:
        check_rest(search, target.target_size)
    work = _later_work(target, search)
    measured = search.measure(target.kinds, work)
    num_options = len(list(measured.rows()))
    tell = part_of(search.tell, num_options / (num_options + work), 1.0)
    if target.target_drop is not None:
        chosen = _reach_drop(measured, search, target.target_drop, tell)
    elif target.target_size is not None:
        chosen = reach_size(measured, search, target.target_size, tell)
    else:
        assert target.target_ratio is not None  # one of the three
        chosen = _reach_ratio(measured, search, target.target_ratio, tell)
    search.tell(1.0)
    return chosen


def _later_work(target: TargetRecipe, search: Search) -> float:
    """Estimate the time of what follows measuring, in options that take as long to measure."""
    if target.target_drop is not None:
        return DROP_ROUNDS * (best_work(search) + build_work(search))
    if target.target_size is not None:
        return budgets_work(search) + best_work(search)
    return best_work(search)


def _reach_ratio(measured: MeasuredOptions, search: Search, ratio: float, tell: Callable[[float], None]) -> Chosen:
    """The best plan with `ratio` times fewer parameters."""
    params = sum(p.numel() for p in search.teacher.parameters())
    tried = build_best(measured, search, math.floor(params / ratio), tell)
    if not tried:
        highest = smallest_plan(measured, search.token_kernel, search.transforms).size.params_ratio
        kinds = ",".join(measured.shapes.kinds)
        raise PlanError(
            f"--target-ratio {ratio:g} is out of reach for {search.name}.",
            hint=f"Use at most --target-ratio {math.floor(highest * 100) / 100:g} with --kinds {kinds}.",
        )
    return choose(tried, search, search.store or "source", measured)


def _reach_drop(measured: MeasuredOptions, search: Search, limit: float, tell: Callable[[float], None]) -> Chosen:
    """The smallest plan whose start is at most `limit` points worse than the teacher."""
    params = sum(p.numel() for p in search.teacher.parameters())
    smallest = smallest_plan(measured, search.token_kernel, search.transforms)
    low, high = math.log(smallest.size.student_params / params), 0.0  # of the share of parameters that is kept
    chosen: Chosen | None = None
    for number in range(DROP_ROUNDS):
        share = math.exp((low + high) / 2)
        start, end = number / DROP_ROUNDS, (number + 1) / DROP_ROUNDS
        building = part_of(tell, start, start + (end - start) * (MAX_BUILT + 1) / (MAX_BUILT + 2))
        tried = build_best(measured, search, math.floor(params * share), building)
        drop = search.drop(build_student(tried[0].plan, search.teacher, search.fitted)) if tried else math.inf
        search.say(f"{1 / share:.2f} times smaller: {drop:.2f} points worse before training")
        if drop <= limit:
            high, chosen = math.log(share), choose(tried, search, search.store or "source", measured)
        else:
            low = math.log(share)
    if chosen is None:
        raise PlanError(
            f"--target-drop {limit:g}: no plan smaller than {search.name} is as good before training.",
            hint="Allow a larger --target-drop, or use --target-ratio and let the training make up for the loss.",
        )
    return chosen
