"""Build the optimizers, set their learning rates, and average the weights (EMA)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitcompress.layers.transforms import TRANSFORM_MODULES
from vitcompress.recipe import DistillRecipe

_POSITION_TABLE = re.compile(r"relative_position|rel_pos|\brpe\b")  # for models that do not name theirs
_Tensors = tuple[Tensor, ...] | list[Tensor]


def parameter_groups(student: nn.Module, recipe: DistillRecipe) -> list[dict[str, Any]]:
    """Split the parameters into those with and without weight decay, shared ones listed once.

    Vectors, parameters that timm exempts, tables of relative positions and transformations do not
    decay: decay pulls towards zero, and a head mix of zero is not the identity.

    Args:
        student: any model.
        recipe: its weight decay.
    """
    exempt = set(student.no_weight_decay()) if hasattr(student, "no_weight_decay") else set()  # type: ignore[operator]
    added = {
        id(p) for module in student.modules() if isinstance(module, TRANSFORM_MODULES) for p in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in student.named_parameters():
        is_exempt = p.ndim <= 1 or name in exempt or id(p) in added or _POSITION_TABLE.search(name)
        (plain if is_exempt else decayed).append(p)
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizers(
    student: nn.Module, recipe: DistillRecipe, matrices: Collection[str]
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Return AdamW for all parameters, or Muon for the given matrices and AdamW for the rest.

    Muon updates each matrix by its orthogonalised momentum. It helps where shared matrices are far
    from a good solution, and is cheap after sharing, with few matrices left to orthogonalise.
    Factors, and matrices of one block, stay with AdamW: a DeiT-Tiny with a quarter of its widths
    loses by Muon at 0.005 and at 0.02.

    Args:
        student: its parameters are shared already.
        recipe: optimizer, learning rates and weight decay.
        matrices: full names of the matrices that blocks share.

    Source: Jordan et al. 2024, Muon; Loshchilov and Hutter 2019, arXiv:1711.05101, AdamW.
    """
    groups = parameter_groups(student, recipe)
    full_matrices = [p for name, p in student.named_parameters() if name in matrices and p.ndim == 2]
    if recipe.optimizer == "adamw" or not full_matrices:  # there are none if every layer is factored
        return [torch.optim.AdamW(groups, lr=recipe.peak_lr)]
    of_muon = {id(p) for p in full_matrices}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in of_muon]} for group in groups]
    return [
        torch.optim.Muon(full_matrices, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=recipe.peak_lr),
    ]


def lr_for_start(
    divergence: float, chance_divergence: float, batch_size: int, width: int, num_images: float, *, trained: bool
) -> float:  # fmt: skip
    """Return AdamW's peak learning rate for a start: low if good, trained, or if images are few.

    Chosen on a small model and on DeiT-Tiny: docs/explanation.md. Grows with the square root of the
    batch size, as gradient noise does.

    Args:
        divergence: KL of the start's predictions from the source's, nats per image.
        chance_divergence: the same for predictions that ignore the image.
        batch_size: images per step.
        width: channels of the model; wider models take smaller steps.
        num_images: number of training images; few are learned by heart, the sooner the larger the
            steps.
        trained: whether its blocks have been trained; larger steps lose what they have learned.

    Source: ours; for the square root, Malladi et al. 2022, arXiv:2205.10287; for the width, Yang et
        al. 2022, arXiv:2203.03466, Sec. 3.
    """
    lost = min(1.0, divergence / chance_divergence) if chance_divergence > 0 else 1.0
    of_images = min(10 / 3, max(1.0, math.sqrt(num_images / 600) * min(1.0, 192 / width)))
    of_width = min(10.0, max(2.0, 960 / width))
    near = min(1.0, 0.7 + lost) * (0.5 if trained else 1.0)
    return float(5e-5 * near * min(2 * of_width, of_images * of_width**lost) * math.sqrt(batch_size / 16))


def lr_for_finetuning(batch_size: int, width: int) -> float:
    """Return AdamW's peak learning rate to fine-tune a trained model, on other classes or sizes.

    Chosen on DeiT-Tiny and Caltech-101, 450 steps of 32 images: docs/explanation.md.

    Args:
        batch_size: images per step.
        width: channels of the model; wider models take smaller steps.

    Source: ours; see `lr_for_start` for the square root and the width.
    """
    return float(1.5e-4 * min(2.0, 192 / width) * math.sqrt(batch_size / 32))


def lr_factor(done: float, warmup: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then half a cosine.

    Args:
        done: share of the training that is over, 0–1.
        warmup: share of the training spent warming up.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak, in place."""
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor


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
