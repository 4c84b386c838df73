"""Put measured options together into plans within a budget.

Costs of options add up only approximately, and how well they do differs between kinds of options.
So candidates come from all kinds together and from each kind alone.

Options are measured in a teacher that is otherwise unchanged. Where all blocks are cut deeply, that
overstates how much the widths of two blocks should differ; `even_widths` brings them closer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.plans.model import Group, Plan
from vitcompress.search.allocate import allocate, fewest_params
from vitcompress.search.measure import MeasuredOptions
from vitcompress.search.options import Shapes, merge

CLOSE = 0.015
"""Prefer plans within 1.5 % of the budget, even where a smaller one costs no more."""

_EVENING_ROUNDS = 16


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


def find_candidates(measured: MeasuredOptions, budget: int) -> list[Candidate]:
    """Find the cheapest plans within a budget, from all kinds together and from each kind alone.

    Args:
        measured: the options and their costs.
        budget: maximum number of parameters of the student.

    Returns:
        Different plans, not built yet; cheapest first.
    """
    shapes = measured.shapes
    # transformations and what lies outside the blocks take their share of the budget
    outside = shapes.unchanged_plan().size.student_params - shapes.params(shapes.blocks)
    max_params = budget - outside
    min_params = max_params - round(CLOSE * budget)
    candidates: dict[str, Candidate] = {}
    for kinds in dict.fromkeys([tuple(shapes.kinds), *((kind,) for kind in shapes.kinds)]):
        allocation = allocate(measured.choices(kinds), len(shapes.blocks), max_params, min_params)
        if allocation is None:
            continue
        choices, predicted = allocation
        plan = shapes.plan(merge(*choice.key) for choice in choices)
        candidates.setdefault(repr(plan.groups), Candidate(", ".join(kinds), plan, predicted))
    return sorted(candidates.values(), key=lambda candidate: candidate.predicted)


def smallest_plan(measured: MeasuredOptions) -> Plan:
    """Return the plan with the fewest parameters that the options allow."""
    shapes = measured.shapes
    choices, num_blocks = measured.choices(shapes.kinds), len(shapes.blocks)
    allocation = allocate(choices, num_blocks, int(fewest_params(choices, num_blocks)[-1]))
    assert allocation is not None  # at worst, every block stays as it is
    return shapes.plan(merge(*choice.key) for choice in allocation[0])


def even_widths(plan: Plan, shapes: Shapes, budget: int, share: float) -> Plan | None:
    """Bring the widths of narrow blocks closer together, relative to the teacher's widths.

    Args:
        plan: a plan for the teacher.
        shapes: the teacher's blocks.
        budget: maximum number of parameters of the student.
        share: of the differences between the logarithms of the widths that remains, 0–1.

    Returns:
        The new plan; None where nothing is narrow, or where no such widths come close to the
        budget.
    """
    if all(group.widths == Widths() for group in plan.groups):
        return None

    def scaled(scales: Sequence[float]) -> Plan:
        return shapes.plan(_scale_widths(shapes, g, share, scale) for g, scale in zip(plan.groups, scales, strict=True))

    low, high = 0.0, 1.0
    for _ in range(_EVENING_ROUNDS):
        middle = (low + high) / 2
        fits = scaled([middle] * len(plan.groups)).size.student_params <= budget
        low, high = (middle, high) if fits else (low, middle)
    scales = [low] * len(plan.groups)
    for number in range(len(scales)):  # widths are integers: the rest of the budget goes to some blocks
        wider = [*scales[:number], high, *scales[number + 1 :]]
        scales = wider if scaled(wider).size.student_params <= budget else scales
    even = scaled(scales)
    return even if (1 - CLOSE) * budget <= even.size.student_params <= budget else None


def _scale_widths(shapes: Shapes, group: Group, share: float, scale: float) -> Group:
    """Set a lone block's widths to `scale · full · (width / full) ** share`; keep other groups."""
    if len(group.blocks) > 1 or group.shared or group.ranks:
        return group
    full = full_widths(shapes.model.get_submodule(group.donor), shapes.family.narrow_attention)
    widths: dict[str, int | None] = {}
    for name in ("hidden", "qk", "v"):
        full_width, width = getattr(full, name), getattr(group.widths, name)
        count = full_width and max(1, int(scale * full_width * ((width or full_width) / full_width) ** share))
        widths[name] = count if count != full_width else None
    return replace(group, widths=Widths(**widths))
