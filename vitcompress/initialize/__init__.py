"""What does a student start from?  Shared matrices, factors and narrow layers, fitted to calibration images.

whole    matrices of groups that share them and have nothing else
factors  factors of groups of several blocks, with the matrices they are added to
walk     narrow blocks and factors of single blocks, one after the other as they run
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from vitcompress.initialize.factors import start_factors
from vitcompress.initialize.walk import start_in_order
from vitcompress.initialize.whole import STARTS
from vitcompress.plan import Plan

__all__ = ["STARTS", "needs_images", "start_student"]


def needs_images(plan: Plan, method: str) -> bool:
    """Whether the starts of a plan are fitted to images."""
    return method == "calibrated" or any(not group.is_plain for group in plan.groups)


def start_student(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Callable[[], Iterable[Tensor]], method: str
) -> None:
    """Set the student's starting weights, in place.

    Args:
        student: as `apply_plan` built it from a copy of the teacher.
        teacher: in eval mode, on the student's device.
        plan: the student's.
        images: gives calibration batches `[B, C, H, W]`, the same each time.
        method: start of whole shared matrices, a key of `STARTS`.
    """
    STARTS[method](student, teacher, plan, images() if method == "calibrated" else ())
    if needs_images(plan, "first"):
        start_factors(student, teacher, plan, images())
        start_in_order(student, teacher, plan, images())
