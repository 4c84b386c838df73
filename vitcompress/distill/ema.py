"""Keep a running mean of the student's weights."""

from __future__ import annotations

from collections.abc import Callable

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
    mean = AveragedModel(student, multi_avg_fn=_make_update(decay))
    mean.n_averaged = mean.n_averaged.cpu()  # torch reads it twice a step, which would wait for a GPU
    return mean


def _make_update(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    @torch.no_grad()
    def update(mean: _Tensors, current: _Tensors, num_averaged: Tensor | int) -> None:
        step = float(num_averaged)
        torch._foreach_lerp_(mean, current, 1 - min(decay, (1 + step) / (10 + step)))

    return update


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of `source` to `target`, a model of the same structure, in place."""
    with torch.no_grad():
        for target_param, source_param in zip(target.parameters(), source.parameters(), strict=True):
            target_param.copy_(source_param)
