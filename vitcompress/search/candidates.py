"""Put measured options together into plans within a budget.

Costs of options add up only approximately, and how well they do differs between kinds of options.
So candidates come from all kinds together and from each kind alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitcompress.plans.model import Plan
from vitcompress.search.allocate import allocate, fewest_params
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import merge

CLOSE = 0.015
"""Prefer plans within 1.5 % of the budget, even where a smaller one costs no more."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may reach the target.

    Attributes:
        kinds: the kinds of options that it was put together from; none where nothing changes.
        plan: what the student is made of.
        predicted: cost of its options together, nats per image.
        measured: divergence of its start from the teacher on images it was not fitted to, nats per
            image; nan where it was not built.
    """

    kinds: tuple[str, ...]
    plan: Plan
    predicted: float
    measured: float = math.nan


def find_candidates(measured: MeasuredOptions, budget: int) -> list[Candidate]:
    """Find the cheapest plans within a budget, from all kinds together and from each kind alone.

    Args:
        measured: the options and their costs.
        budget: maximum number of parameters of the student.

    Returns:
        The best plan of each set of kinds, not built yet; cheapest first.
    """
    shapes = measured.shapes
    # transformations and what lies outside the blocks take their share of the budget
    outside = shapes.unchanged_plan().size.student_params - shapes.params(shapes.blocks)
    max_params = budget - outside
    min_params = max_params - round(CLOSE * budget)
    plans: dict[tuple[str, ...], Candidate] = {}
    for kinds in dict.fromkeys([tuple(shapes.kinds), *((kind,) for kind in shapes.kinds)]):
        allocation = allocate(measured.choices(kinds, budget), len(shapes.blocks), max_params, min_params)
        if allocation is None:
            continue
        choices, cost = allocation
        plan = shapes.plan(merge(choice.key) for choice in choices)
        used = tuple(kind for kind in shapes.kinds if any(o.kind == kind for choice in choices for o in choice.key))
        plans.setdefault(used, Candidate(used, plan, cost))
    return sorted(plans.values(), key=lambda candidate: candidate.predicted)


def smallest_plan(measured: MeasuredOptions) -> Plan:
    """Return the plan with the fewest parameters that the options allow."""
    shapes = measured.shapes
    choices, num_blocks = measured.choices(shapes.kinds, 0), len(shapes.blocks)
    allocation = allocate(choices, num_blocks, int(fewest_params(choices, num_blocks)[-1]))
    assert allocation is not None  # at worst, every block stays as it is
    return shapes.plan(merge(choice.key) for choice in allocation[0])
