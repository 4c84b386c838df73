"""Put measured options together into plans within a budget.

Costs of options add up only approximately: errors of layers have much in common. So candidates come
from several versions of the costs, and from all kinds of options together and each kind alone; what
each plan costs is then predicted with what its options' errors have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vitcompress.plans.model import Plan
from vitcompress.search.allocate import Choice, allocate, fewest_params
from vitcompress.search.measured import MeasuredOptions
from vitcompress.search.options import Option, merge, nats_of

CLOSE = 0.015
"""Prefer plans within 1.5 % of the budget, even where a smaller one costs no more."""

EVENNESS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Versions of the costs; in the last, all blocks are alike."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may reach the target.

    Attributes:
        kinds: the kinds of options that it was put together from.
        plan: what the student is made of.
        predicted: cost of its options together, nats per image.
        measured: divergence of its start from the teacher on images it was not fitted to, nats per
            image; nan where it was not built.
    """

    kinds: tuple[str, ...]
    plan: Plan
    predicted: float
    measured: float = math.nan


def find_candidates(measured: MeasuredOptions, budget: int, evenness: Sequence[float] = EVENNESS) -> list[Candidate]:
    """Find the cheapest plans within a budget.

    Args:
        measured: the options and their costs.
        budget: maximum number of parameters of the student.
        evenness: versions of the costs to choose by; see `MeasuredOptions.choices`.

    Returns:
        The best plan of all kinds together and of each kind alone, not built yet; cheapest first.
    """
    shapes = measured.shapes
    # transformations and what lies outside the blocks take their share of the budget
    outside = shapes.unchanged_plan().size.student_params - shapes.params(shapes.blocks)
    max_params = budget - outside
    min_params = max_params - round(CLOSE * budget)
    plans: dict[str, Candidate] = {}
    for kinds in dict.fromkeys([tuple(shapes.kinds), *((kind,) for kind in shapes.kinds)]):
        found = []
        for even in evenness:
            allocation = allocate(measured.choices(kinds, even), len(shapes.blocks), max_params, min_params)
            if allocation is not None:
                found.append((_predict(allocation[0]), allocation[0]))
        if not found:
            continue
        predicted, choices = min(found, key=lambda item: item[0])
        plan = shapes.plan(merge(choice.key) for choice in choices)
        used = tuple(kind for kind in shapes.kinds if any(o.kind == kind for choice in choices for o in choice.key))
        plans.setdefault(repr(plan.groups), Candidate(used or kinds, plan, predicted))
    return sorted(plans.values(), key=lambda candidate: candidate.predicted)


def _predict(choices: Iterable[Choice]) -> float:
    """Predict what a plan costs, nats per image: its options' scores add up."""
    options: list[Option] = [option for choice in choices for option in choice.key]
    return nats_of(torch.stack(torch.broadcast_tensors(*(o.scores for o in options if o.scores is not None))).sum(0))


def smallest_plan(measured: MeasuredOptions) -> Plan:
    """Return the plan with the fewest parameters that the options allow."""
    shapes = measured.shapes
    choices, num_blocks = measured.choices(shapes.kinds, 0.0), len(shapes.blocks)
    allocation = allocate(choices, num_blocks, int(fewest_params(choices, num_blocks)[-1]))
    assert allocation is not None  # at worst, every block stays as it is
    return shapes.plan(merge(choice.key) for choice in allocation[0])
