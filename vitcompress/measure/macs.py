"""How much is there to compute?  Multiply-accumulates of one image, counted on meta tensors: no weights are read.

Every product of matrices and every convolution that a forward pass runs counts, both of attention's among them, so
DeiT-B has 17.56 G. Norms, activations, softmax and additions do not count, nor do they elsewhere.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcompress.plans.model import Plan
from vitcompress.surgery import apply_plan


def macs_of(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass of one image.

    Args:
        model: in eval mode, on any device; meta will do.
        input_size: (channels, height, width).

    Returns:
        The same number for fused and plain attention, and on every device.
    """
    like = next(model.parameters())
    image = torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)
    # fused attention is a different kernel on each device, and not each of them has a formula: as two products it has
    # with gradients: torch's counter hooks them, and fails without on a parameter handed to a layer (SigLIP's latent)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops()) // 2


def with_macs(plan: Plan, model: nn.Module, input_size: tuple[int, int, int]) -> Plan:
    """The same plan with the multiply-accumulates of `model` and of the student that `apply_plan` builds from it.

    Args:
        plan: of a model with the same blocks.
        model: nothing shared in it yet, on any device; not changed.
        input_size: (channels, height, width) of the images.
    """
    built = copy.deepcopy(model).to("meta").eval()
    teacher_macs = macs_of(built, input_size)
    apply_plan(built, plan)
    student_macs = macs_of(built.eval(), input_size)
    macs_ratio = round(teacher_macs / student_macs, 4)
    size = replace(plan.size, teacher_macs=teacher_macs, student_macs=student_macs, macs_ratio=macs_ratio)
    return replace(plan, size=size)
