"""Build the optimizers: AdamW, or Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from vitcompress.layers.transforms import TRANSFORM_MODULES
from vitcompress.recipe import DistillRecipe

_POSITION_TABLE = re.compile(r"relative_position|rel_pos|\brpe\b")  # for models that do not name theirs


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
    """Return AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Muon updates each matrix by its orthogonalised momentum. It helps where shared matrices are far
    from a good solution, and is cheap after sharing, with few matrices left to orthogonalise.
    Factors stay with AdamW.

    Args:
        student: its parameters are shared already.
        recipe: optimizer, learning rates and weight decay.
        matrices: full names of the blocks' matrices.

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
