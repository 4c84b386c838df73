"""Count multiply-accumulates of one image on meta tensors, without reading weights.

Every matrix product and every convolution of a forward pass counts, including both products of
attention, so DeiT-B has 17.56 G. Norms, activations, softmax and additions do not count, as is
usual.
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
    """Count the multiply-accumulates of one forward pass of one image.

    Args:
        model: in eval mode, on any device, including meta.
        input_size: (channels, height, width).

    Returns:
        The same number with fused and plain attention, and on every device.
    """
    like = next(model.parameters())
    image = torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)
    # MATH, because fused attention is another kernel on each device, and the counter does not know
    # all of them. With gradients, because without them the counter's hooks fail on parameters given
    # to a layer (SigLIP's latent).
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops()) // 2


def with_macs(plan: Plan, model: nn.Module, input_size: tuple[int, int, int]) -> Plan:
    """Return the plan with the multiply-accumulates of the source and of its student.

    Args:
        plan: of a model with the same blocks.
        model: the source, on any device; it is not changed.
        input_size: (channels, height, width) of the images.
    """
    built = copy.deepcopy(model).to("meta").eval()
    teacher_macs = macs_of(built, input_size)
    apply_plan(built, plan)
    student_macs = macs_of(built.eval(), input_size)
    macs_ratio = round(teacher_macs / student_macs, 4)
    size = replace(plan.size, teacher_macs=teacher_macs, student_macs=student_macs, macs_ratio=macs_ratio)
    return replace(plan, size=size)
