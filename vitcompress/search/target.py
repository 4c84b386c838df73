"""Find the best plan for a target: a ratio, a size, or a drop.

A ratio sets a budget of parameters. For a size, the largest budget whose file fits is searched for,
in each store; for a drop, the smallest budget that loses no more.

allocate     the cheapest sum of options within the budget
candidates   plans from these sums, and what they cost together
build        the students of the best candidates, and the cost of their starts
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

from vitcompress.errors import PlanError
from vitcompress.plans.make import with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.quantize.codecs import STORES, num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.recipe import TargetRecipe
from vitcompress.runtime.shares import part_of
from vitcompress.search.build import build_best
from vitcompress.search.candidates import find_candidates, smallest_plan
from vitcompress.search.divergence import divergence
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.model import Chosen, Search, choose

DROP_ROUNDS = 7
_SIZE_ROUNDS = 12
_MEASURING_SHARE = 0.4  # of the time of a search
_BUDGETS_SHARE = 0.3  # of the time to reach a size, for finding the budget
_COMPARED_STORES = ("source", "int8", "int4")

Tell = Callable[[float], None]
Measure = Callable[[Sequence[str], Tell], MeasuredOptions]


def search_target(target: TargetRecipe, search: Search, tell: Tell, measure: Measure | None = None) -> Chosen:
    """Measure all options, then find the best plan for a target.

    Args:
        target: a ratio, a size or a drop.
        search: the teacher, its images and what is given of the student.
        tell: called with the share that is done, 0–1; it never falls.
        measure: returns the options; None measures them.

    Raises:
        PlanError: the target is out of reach; the hint names one that is not.
    """
    if target.target_size is not None:
        check_rest(search, target.target_size)
    measured = (measure or search.measure)(target.kinds, part_of(tell, 0.0, _MEASURING_SHARE))
    chosen = reach(target, measured, search, part_of(tell, _MEASURING_SHARE, 1.0))
    tell(1.0)
    return chosen


def reach(target: TargetRecipe, measured: MeasuredOptions, search: Search, tell: Tell) -> Chosen:
    """Find the best plan for a target.

    Args:
        target: a ratio, a size or a drop.
        measured: the options and their costs.
        search: the teacher, its images and what is given of the student.
        tell: called with the share of this that is done, 0–1.

    Raises:
        PlanError: the target is out of reach; the hint names one that is not.
    """
    if target.target_drop is not None:
        return _reach_drop(measured, search, target.target_drop, tell)
    if target.target_size is not None:
        return _reach_size(measured, search, target.target_size, tell)
    assert target.target_ratio is not None  # one of the three
    return _reach_ratio(measured, search, target.target_ratio, tell)


def _reach_ratio(measured: MeasuredOptions, search: Search, ratio: float, tell: Tell) -> Chosen:
    """Return the best plan with `ratio` times fewer parameters."""
    params = sum(p.numel() for p in search.teacher.parameters())
    candidates = find_candidates(measured, math.floor(params / ratio))
    if not candidates:
        highest = smallest_plan(measured).size.params_ratio
        kinds = ",".join(measured.shapes.kinds)
        raise PlanError(
            f"--target-ratio {ratio:g} is out of reach for {search.name}.",
            hint=f"Use at most --target-ratio {math.floor(highest * 100) / 100:g} with --kinds {kinds}.",
        )
    return choose(*build_best(candidates, search, tell), search, search.store or "source")


def _reach_drop(measured: MeasuredOptions, search: Search, limit: float, tell: Tell) -> Chosen:
    """Return the smallest plan whose start is at most `limit` points worse than the teacher."""
    params = sum(p.numel() for p in search.teacher.parameters())
    smallest = smallest_plan(measured)
    low, high = math.log(smallest.size.student_params / params), 0.0  # of the share of parameters that is kept
    chosen: Chosen | None = None
    for number in range(DROP_ROUNDS):
        share = math.exp((low + high) / 2)
        candidates = find_candidates(measured, math.floor(params * share))
        drop = math.inf
        if candidates:
            tried, student = build_best(candidates[:1], search, lambda done: None)
            drop = search.drop(student)
        tell((number + 1) / DROP_ROUNDS)
        search.say(f"{1 / share:.2f} times smaller: {drop:.2f} points worse before training")
        if drop <= limit:
            high, chosen = math.log(share), choose([*tried, *candidates[1:]], student, search, search.store or "source")
        else:
            low = math.log(share)
    if chosen is None:
        raise PlanError(
            f"--target-drop {limit:g}: no plan smaller than {search.name} is as good before training.",
            hint="Allow a larger --target-drop, or use --target-ratio and let the training make up for the loss.",
        )
    return chosen


def _reach_size(measured: MeasuredOptions, search: Search, limit: int, tell: Tell) -> Chosen:
    """Return the best plan, with the best store, for a file of at most `limit` bytes."""
    stores = _stores(search)
    budgets = []
    for number, store in enumerate(stores):
        share = _BUDGETS_SHARE / len(stores)
        part = part_of(tell, share * number, share * (number + 1))
        budget, predicted = _largest_budget(measured, search, store, limit, part)
        if math.isfinite(predicted):
            budgets.append((predicted + _storing_cost(store, search), budget, store))
    if not budgets:
        min_bytes = _file_bytes(smallest_plan(measured), search, stores[-1])
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach for {search.name}.",
            hint=f"Use at least --target-size {math.ceil(min_bytes / 1000)}kB, stored as {stores[-1]}.",
        )
    _, budget, store = min(budgets)
    candidates = [c for c in find_candidates(measured, budget) if _file_bytes(c.plan, search, store) <= limit]
    return choose(*build_best(candidates, search, part_of(tell, _BUDGETS_SHARE, 1.0)), search, store)


def _stores(search: Search) -> Sequence[str]:
    """Return the stores to choose from, the smallest last."""
    return [search.store] if search.store else _COMPARED_STORES


def check_rest(search: Search, limit: int) -> None:
    """Check, before anything is measured, that what lies outside the blocks is not too large.

    Args:
        search: the teacher and how the file holds its weights.
        limit: maximum bytes of the file.

    Raises:
        PlanError: it exceeds `limit` bytes, in the store that takes the fewest.
    """
    blocks = tuple(f"{block}." for block in search.blocks)
    rest = min(
        num_bytes({name: t for name, t in stored_tensors(search.empty, store).items() if not name.startswith(blocks)})
        for store in _stores(search)
    )
    if rest > limit:
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach for {search.name}: {rest:,} bytes lie outside its blocks.",
            hint=f"Use more than --target-size {math.ceil(rest / 1000)}kB, or a smaller model.",
        )


def _largest_budget(measured: MeasuredOptions, search: Search, store: str, limit: int, tell: Tell) -> tuple[int, float]:
    """Return the largest budget whose plan fits in `limit` bytes, and the plan's predicted cost.

    The cost is infinite where there is no such plan.
    """

    def predict(budget: int) -> float:
        best = find_candidates(measured, budget)[0]
        return best.predicted if _file_bytes(best.plan, search, store) <= limit else math.inf

    unchanged = measured.shapes.unchanged_plan()
    low, high = smallest_plan(measured).size.student_params, unchanged.size.student_params
    if _file_bytes(unchanged, search, store) <= limit:
        return high, 0.0
    cost = predict(low)
    for number in range(_SIZE_ROUNDS if math.isfinite(cost) else 0):
        tell((number + 1) / (_SIZE_ROUNDS + 1))
        middle = (low + high) // 2
        predicted = predict(middle)
        low, high, cost = (middle, high, predicted) if math.isfinite(predicted) else (low, middle, cost)
    return low, cost


def _file_bytes(plan: Plan, search: Search, store: str) -> int:
    """Return an upper bound of the bytes of a plan's file."""
    return with_sizes_on(plan, search.empty, store).size.student_bytes + search.header_bytes(plan, store)


def _storing_cost(store: str, search: Search) -> float:
    """Return the divergence that storing the teacher's weights causes, nats per image."""
    if STORES[store].codec is None:
        return 0.0
    stored = copy.deepcopy(search.teacher)
    round_to(stored, stored_tensors(stored, store), store)
    return divergence(stored, search.teacher, search.judged)
