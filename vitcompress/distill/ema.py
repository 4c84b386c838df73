"""Keep a running mean of the student's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]


def running_mean(student: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `student` whose `update_parameters` moves it towards the student.

    timm's version goes through the state dict, which lists a shared weight once per block, and so
    would update it several times a step.

    Args:
        student: its parameters are shared already; the copy shares them too.
        decay: share of the mean that stays at a step. Starts at 1/10 and rises as (1 + step)/(10 +
            step), because a mean over more steps than there were would be dominated by the start.
    """

    @torch.no_grad()
    def update(mean: _Tensors, current: _Tensors, num_averaged: Tensor | int) -> None:
        step = float(num_averaged)
        torch._foreach_lerp_(mean, current, 1 - min(decay, (1 + step) / (10 + step)))

    mean = AveragedModel(student, multi_avg_fn=update)
    mean.n_averaged = mean.n_averaged.cpu()  # torch reads it twice a step, which would wait for a GPU
    return mean
