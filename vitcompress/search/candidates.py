"""Put measured options together into plans within a budget.

Costs of options add up only approximately, and how well they do differs between kinds of options.
So candidates come from all kinds together and from each kind alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitcompress.plans.make import plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.search.allocate import Choice, allocate
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.options import merge

CLOSE = 0.015
"""Prefer plans within 1.5 % of the budget, even where a smaller one costs no more."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may reach the target.

    Attributes:
        name: the kinds of options it was put together from.
        plan: what the student is made of.
        predicted: sum of its options' costs, nats per image; nan where it was not put together from
            options.
        cost: divergence of its start from the teacher on images it was not fitted to, nats per
            image; nan where it was not built.
    """

    name: str
    plan: Plan
    predicted: float
    cost: float = math.nan


def find_candidates(
    measured: MeasuredOptions, budget: int, token_kernel: int, transforms: tuple[str, ...]
) -> list[Candidate]:
    """Find the cheapest plans within a budget, from all kinds together and from each kind alone.

    Args:
        measured: the options and their costs.
        budget: maximum number of parameters of the student.
        token_kernel: size of the token convolution.
        transforms: transformations of every block.

    Returns:
        Different plans, not built yet; cheapest first.
    """
    shapes = measured.shapes
    # transformations and what lies outside the blocks take their share of the budget
    outside = unchanged_plan(measured, token_kernel, transforms).size.student_params - shapes.params(shapes.blocks)
    max_params = budget - outside
    candidates: dict[str, Candidate] = {}
    mixes = [tuple(shapes.kinds), *((kind,) for kind in shapes.kinds)] if len(shapes.kinds) > 1 else [shapes.kinds]
    for kinds in mixes:
        min_params = max_params - round(CLOSE * budget)
        allocation = allocate(measured.choices(kinds), len(shapes.blocks), max_params, min_params)
        if allocation is None:
            continue
        choices, predicted = allocation
        groups = tuple(merge(*choice.key) for choice in choices)
        plan = plan_of(shapes.model, shapes.family, groups, transforms, token_kernel)
        candidates.setdefault(repr(groups), Candidate(", ".join(kinds), plan, predicted))
    return sorted(candidates.values(), key=lambda candidate: candidate.predicted)


def unchanged_plan(measured: MeasuredOptions, token_kernel: int, transforms: tuple[str, ...]) -> Plan:
    """Return the plan that leaves every block as it is and adds the transformations.

    Args:
        measured: the teacher.
        token_kernel: size of the token convolution.
        transforms: transformations of every block.
    """
    shapes = measured.shapes
    groups = [Group((block,), ()) for block in shapes.blocks]
    return plan_of(shapes.model, shapes.family, groups, transforms, token_kernel)


def smallest_plan(measured: MeasuredOptions, token_kernel: int, transforms: tuple[str, ...]) -> Plan:
    """Return the plan with the fewest parameters that the options allow.

    Args:
        measured: the options.
        token_kernel: size of the token convolution.
        transforms: transformations of every block.
    """
    shapes = measured.shapes
    choices = measured.choices(shapes.kinds)
    best: list[tuple[int, list[Choice]]] = [(0, [])]
    for end in range(1, len(shapes.blocks) + 1):
        ending = [c for c in choices if c.last == end]
        best.append(min(((best[c.first][0] + c.params, [*best[c.first][1], c]) for c in ending), key=lambda t: t[0]))
    groups = [merge(*choice.key) for choice in best[-1][1]]
    return plan_of(shapes.model, shapes.family, groups, transforms, token_kernel)
