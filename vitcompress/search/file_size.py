"""Find the best plan for a file size: a store, and the largest budget that fits in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

from vitcompress.errors import PlanError
from vitcompress.families.find import family_of
from vitcompress.plans.make import with_sizes_on
from vitcompress.plans.model import Plan
from vitcompress.quantize.codecs import STORES, num_bytes
from vitcompress.quantize.store import round_to, stored_tensors
from vitcompress.search.build import best_work, build_best, part_of
from vitcompress.search.candidates import find_candidates, smallest_plan, unchanged_plan
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.model import Chosen, Search, choose
from vitcompress.search.sensitivity import divergence

_ROUNDS = 12
_COMPARED_STORES = ("source", "int8", "int4")
_ALLOCATION_WORK = 2.0  # in options whose measurement takes as long; measured on ViTs of 6 and 12 blocks


def reach_size(measured: MeasuredOptions, search: Search, limit: int, tell: Callable[[float], None]) -> Chosen:
    """Find the best plan, and the best store, for a file of at most `limit` bytes.

    Args:
        measured: the options and their costs.
        search: what the search works on.
        limit: maximum size of the file, in bytes.
        tell: called with the share of this that is done, 0–1.

    Raises:
        PlanError: the size is out of reach; the hint names one that is not.
    """
    stores = _stores(search)
    budgets_share = budgets_work(search) / (budgets_work(search) + best_work(search))
    options = []
    for number, store in enumerate(stores):
        part = part_of(tell, budgets_share * number / len(stores), budgets_share * (number + 1) / len(stores))
        budget, predicted = _largest_budget(measured, search, store, limit, part)
        if math.isfinite(predicted):
            options.append((predicted + _storing_cost(store, search), budget, store))
    if not options:
        smallest = smallest_plan(measured, search.token_kernel, search.transforms)
        min_bytes = _file_bytes(smallest, search, stores[-1])
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach for {search.name}.",
            hint=f"Use at least --target-size {math.ceil(min_bytes / 1000)}kB, stored as {stores[-1]}.",
        )
    _, budget, store = min(options)

    def fits(plan: Plan) -> bool:
        return _file_bytes(plan, search, store) <= limit

    return choose(
        build_best(measured, search, budget, part_of(tell, budgets_share, 1.0), fits), search, store, measured
    )


def _stores(search: Search) -> Sequence[str]:
    """The stores to choose from, the smallest last."""
    return [search.store] if search.store else _COMPARED_STORES


def check_rest(search: Search, limit: int) -> None:
    """Check, before anything is measured, that what lies outside the blocks is not too large.

    Args:
        search: what the search works on.
        limit: maximum size of the file, in bytes.

    Raises:
        PlanError: it is too large, in the store that takes the fewest bytes.
    """
    blocks = tuple(f"{block}." for block in family_of(search.empty, search.name).block_names(search.empty))
    rest = min(
        num_bytes({name: t for name, t in stored_tensors(search.empty, store).items() if not name.startswith(blocks)})
        for store in _stores(search)
    )
    if rest > limit:
        raise PlanError(
            f"--target-size {limit:,} bytes is out of reach for {search.name}: {rest:,} bytes lie outside its blocks.",
            hint=f"Use more than --target-size {math.ceil(rest / 1000)}kB, or a smaller model.",
        )


def _largest_budget(
    measured: MeasuredOptions, search: Search, store: str, limit: int, tell: Callable[[float], None]
) -> tuple[int, float]:
    """The largest budget whose plan fits in `limit` bytes, and the plan's predicted cost.

    The cost is infinite where there is no such plan.
    """

    def predict(budget: int) -> float:
        best = find_candidates(measured, budget, search.token_kernel, search.transforms)[0]
        return best.predicted if _file_bytes(best.plan, search, store) <= limit else math.inf

    unchanged = unchanged_plan(measured, search.token_kernel, search.transforms)
    if _file_bytes(unchanged, search, store) <= limit:
        return unchanged.size.student_params, 0.0
    low = smallest_plan(measured, search.token_kernel, search.transforms).size.student_params
    high, cost = unchanged.size.student_params, predict(low)
    for number in range(_ROUNDS if math.isfinite(cost) else 0):
        tell((number + 1) / (_ROUNDS + 1))
        middle = (low + high) // 2
        predicted = predict(middle)
        low, high, cost = (middle, high, predicted) if math.isfinite(predicted) else (low, middle, cost)
    return low, cost


def _file_bytes(plan: Plan, search: Search, store: str) -> int:
    """Upper bound of the bytes of a plan's file."""
    return with_sizes_on(plan, search.empty, store).size.student_bytes + search.header_bytes(plan, store)


def _storing_cost(store: str, search: Search) -> float:
    """What storing the teacher's own weights does to its predictions, nats per image."""
    if STORES[store].codec is None:
        return 0.0
    stored = copy.deepcopy(search.teacher)
    round_to(stored, stored_tensors(stored, store), store)
    return divergence(stored.eval(), search.teacher, search.held_out)


def budgets_work(search: Search) -> float:
    """Estimate the time to find the budgets for a size, in options that take as long to measure."""
    return len(_stores(search)) * (_ROUNDS + 1) * _ALLOCATION_WORK
