"""Set the starting weights of a student, or of one of its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from vitcompress.initialize.blockwise import start_in_order
from vitcompress.initialize.factors import start_factors
from vitcompress.initialize.importance import TokenWeights
from vitcompress.initialize.shared_matrices import STARTS
from vitcompress.plans.model import Plan


def needs_images(plan: Plan, method: str) -> bool:
    """Whether the start of a plan's student is fitted to images.

    Args:
        plan: the student's plan.
        method: start of whole shared matrices, a key of `STARTS`.
    """
    return any(not group.is_plain or (method == "calibrated" and len(group.blocks) > 1) for group in plan.groups)


def start_student(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Callable[[], Iterable[Tensor]], method: str,
    tell: Callable[[float], None] = lambda done: None, weights: TokenWeights | None = None,
) -> None:  # fmt: skip
    """Set the student's starting weights, in place.

    Args:
        student: as `apply_plan` built it from a copy of the teacher.
        teacher: in eval mode, on the student's device.
        plan: the student's plan.
        images: returns calibration batches `[B, C, H, W]`, the same ones each time.
        method: start of whole shared matrices, a key of `STARTS`.
        tell: called with the share that is done, 0–1.
        weights: how much each token counts; None computes it.
    """
    STARTS[method](student, teacher, plan, images)
    if needs_images(plan, "first"):
        start_factors(student, teacher, plan, images())
        start_in_order(student, teacher, plan, images(), tell, weights)
