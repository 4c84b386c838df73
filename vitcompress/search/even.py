"""Bring the widths of a plan's narrow blocks closer together.

Options are measured in a teacher that is otherwise unchanged. Where all blocks are cut deeply, that
overstates how much the widths of two blocks should differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.plans.make import plan_of
from vitcompress.plans.model import Group, Plan
from vitcompress.search.candidates import CLOSE
from vitcompress.search.options import Shapes

_ROUNDS = 16


def even_widths(plan: Plan, shapes: Shapes, budget: int, share: float) -> Plan | None:
    """Bring the widths of narrow blocks closer together, relative to the teacher's widths.

    Args:
        plan: any plan.
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
        groups = [_scale_widths(shapes, group, share, scale) for group, scale in zip(plan.groups, scales, strict=True)]
        return plan_of(shapes.model, shapes.family, groups, plan.transforms, plan.token_kernel)

    low, high = 0.0, 1.0
    for _ in range(_ROUNDS):
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
