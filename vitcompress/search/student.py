"""Build the student of a plan with its starting weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from vitcompress.initialize.align import align_model
from vitcompress.initialize.importance import TokenWeights
from vitcompress.initialize.start import start_student
from vitcompress.plans.model import Plan
from vitcompress.search.divergence import CHUNK_IMAGES
from vitcompress.surgery import apply_plan


def build_student(
    plan: Plan, teacher: nn.Module, images: Tensor, tell: Callable[[float], None] = lambda done: None,
    weights: TokenWeights | None = None,
) -> nn.Module:  # fmt: skip
    """Build the student of a plan with its starting weights, in eval mode.

    Args:
        plan: of the teacher.
        teacher: in eval mode; not changed.
        images: for calibration, `[B, C, H, W]`.
        tell: called with the share that is done, 0–1.
        weights: how much each token counts; None computes it.
    """
    source = align_model(teacher, plan)
    student = copy.deepcopy(source)
    apply_plan(student, plan)
    start_student(student, source, plan, lambda: images.split(CHUNK_IMAGES), "calibrated", tell, weights)
    return student.eval()
