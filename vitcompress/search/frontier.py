"""List the best plans for many budgets, to choose where to stop.

cost │╲                 knee: the point that lies farthest below the line from the smallest
│ ╲ ╲ _            plan to the whole model, which costs nothing
│  ╲    ╲ _
│    ● _    ╲ _
│        ‾ ‾ ‾ ‾‾●
└───────────────── parameters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vitcompress.plans.model import Plan, Size
from vitcompress.search.candidates import Candidate, find_candidates, smallest_plan
from vitcompress.search.measured import MeasuredOptions

COMMON_RATIOS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NUM_BUDGETS = 16


@dataclass(frozen=True)
class FrontierPoint:
    """The best plan for a budget.

    Attributes:
        target_ratio: how many times fewer parameters the budget asks for.
        size: of the plan; its `params_ratio` is at least the target.
        predicted_nats: predicted cost of the plan, nats per image.
        kinds: the kinds of options that it uses.
        is_common: whether the target is one of `COMMON_RATIOS`.
        is_knee: whether it is the knee.
    """

    target_ratio: float
    size: Size
    predicted_nats: float
    kinds: tuple[str, ...]
    is_common: bool = False
    is_knee: bool = False


def trace_frontier(
    measured: MeasuredOptions, sized: Callable[[Plan], Plan], tell: Callable[[float], None]
) -> list[FrontierPoint]:
    """Return the best plans for budgets between the whole model and the smallest plan.

    Targets in use are always among them, where they are in reach. Of the others, those are left out
    that cost as much as a smaller plan.

    Args:
        measured: the options and their costs.
        sized: returns a plan with its bytes and multiply-accumulates.
        tell: called with the share that is done, 0–1.

    Returns:
        The points, most parameters first; the knee, as `knee_of` defines it, is marked.
    """
    whole = measured.shapes.unchanged_plan().size.teacher_params
    ratios = target_ratios(whole / smallest_plan(measured).size.student_params)
    points: dict[str, FrontierPoint] = {}
    for number, ratio in enumerate(ratios):
        best = _best(measured, math.floor(whole / ratio))
        tell((number + 1) / len(ratios))
        if best is None:
            continue
        is_common, key = ratio in COMMON_RATIOS, repr(best.plan.groups)
        if key not in points or is_common:
            plan = sized(best.plan)
            points[key] = FrontierPoint(ratio, plan.size, best.predicted, best.kinds, is_common)
    kept = _undominated(sorted(points.values(), key=lambda point: -point.size.student_params))
    knee = knee_of([(point.size.student_params, point.predicted_nats) for point in kept], whole)
    return [replace(point, is_knee=number == knee) for number, point in enumerate(kept)]


def target_ratios(highest: float) -> list[float]:
    """Return about 16 ratios up to the highest, in order: common ones, and evenly spread ones."""
    common = [ratio for ratio in COMMON_RATIOS if ratio <= highest]
    count = NUM_BUDGETS - len(common)
    spread = [highest ** (number / count) for number in range(1, count)]
    near = [ratio for ratio in spread if all(abs(math.log(ratio / other)) > 0.05 for other in (*common, highest))]
    return sorted({*common, *near, highest})


def knee_of(points: Sequence[tuple[float, float]], whole: float) -> int | None:
    """Return the number of the knee: the point farthest below the chord in (parameters, cost).

    The chord leads from the point with the fewest parameters to the whole model, whose cost is 0.
    Beyond the knee, leaving out parameters costs more than on average. On a logarithmic axis of
    costs, the knee would be among plans that cost next to nothing.

    Args:
        points: parameters and cost of each.
        whole: parameters of the model.

    Returns:
        None where no point lies below the chord.

    Source: Satopaa et al. 2011, "Finding a kneedle in a haystack", doi:10.1109/ICDCSW.2011.20.
    """
    if len(points) < 3:
        return None
    params, cost = min(points)
    distances = [cost * (whole - x) / (whole - params) - y for x, y in points]
    knee = max(range(len(points)), key=distances.__getitem__)
    return knee if distances[knee] > 0 else None


def _best(measured: MeasuredOptions, budget: int) -> Candidate | None:
    """The cheapest plan within a budget; None where rounding leaves none."""
    candidates = find_candidates(measured, budget)
    return candidates[0] if candidates else None


def _undominated(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """Leave out points, but common targets, that cost no less than one with fewer parameters."""
    kept: list[FrontierPoint] = []
    for point in reversed(points):
        if point.is_common or all(point.predicted_nats < other.predicted_nats for other in kept):
            kept.append(point)
    return kept[::-1]
