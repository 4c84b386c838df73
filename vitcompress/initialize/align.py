"""Make the blocks of a group more alike without changing what the model computes.

    MLP      neurons may be permuted                                      fc1 → P fc1,  fc2 → fc2 Pᵀ
    heads    may be permuted; within a head, queries and keys             q → R q,  k → R k
             may be rotated together, and values with the projection      v → S v,  proj → proj Sᵀ

Blocks were trained separately, so what they have in common sits in different neurons and heads of
each. Their mean, or one matrix with small residuals, is far from all of them unless they are
aligned first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vitcompress.families.narrow import is_plain_attention, is_plain_mlp
from vitcompress.initialize.regression import wide
from vitcompress.plans.model import Group, Plan

ROUNDS = 3
"""The first round aligns all blocks with the first block, the others with their mean."""


def align_model(teacher: nn.Module, plan: Plan) -> nn.Module:
    """Align the blocks that share matrices in a model that computes what the teacher does.

    Args:
        teacher: not changed.
        plan: the student's plan.

    Returns:
        A copy; the teacher itself where nothing can be aligned. Blocks that share no matrices, and
        layers that are not timm's plain ones, stay as they are.

    Source: ours. Neurons by assignment: Ainsworth et al. 2023, arXiv:2209.04836, Sec. 3.2; heads by
        orthogonal Procrustes: Schönemann 1966.
    """
    if not any(_alignable(teacher, group) for group in plan.groups):
        return teacher
    model = copy.deepcopy(teacher)
    for group in plan.groups:
        align_group(model, group)
    return model


def align_group(model: nn.Module, group: Group) -> None:
    """Align the blocks of a group, in place; the model computes the same as before.

    Args:
        model: contains the teacher's blocks.
        group: of a plan for the model.
    """
    with torch.no_grad():
        for part, align in _alignable(model, group).items():
            align([model.get_submodule(f"{block}.{part}") for block in group.blocks])


def _alignable(model: nn.Module, group: Group) -> dict[str, Callable[[Sequence[Any]], None]]:
    """For each part to align, the function that aligns."""
    if len(group.blocks) == 1:
        return {}
    kinds = {
        "mlp": ("fc1", "fc2", is_plain_mlp, _align_neurons),
        "attn": ("qkv", "proj", is_plain_attention, _align_heads),
    }
    return {
        part: align
        for part, (reads, writes, is_plain, align) in kinds.items()
        if any(f"{part}.{layer}.weight" in group.shared for layer in (reads, writes))
        and all(is_plain(getattr(model.get_submodule(block), part, None)) for block in group.blocks)
    }


def _align_neurons(mlps: Sequence[Any]) -> None:
    """Permute the neurons of some MLPs, in place."""
    for number in range(ROUNDS):
        neurons = wide(torch.stack([torch.cat([mlp.fc1.weight, mlp.fc2.weight.T], 1) for mlp in mlps]))  # [G, M, 2·C]
        goal = neurons.mean(0) if number else neurons[0]
        for mlp, rows in zip(mlps, neurons, strict=True):
            order = _assign(goal @ rows.T)
            mlp.fc1.weight.copy_(mlp.fc1.weight[order])
            mlp.fc1.bias.copy_(mlp.fc1.bias[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])


def _align_heads(attns: Sequence[Any]) -> None:
    """Permute and rotate attention heads, in place."""
    heads = attns[0].num_heads
    for number in range(ROUNDS):
        stacked = torch.stack([_maps(attn) for attn in attns])  # [G, 4, H, D, C]
        goal = (stacked.mean(0) if number else stacked[0]).unflatten(0, (2, 2))
        for attn, maps in zip(attns, stacked, strict=True):
            # for each pair of heads, the rotation of the second to the first: queries with keys,
            # values with the projection
            u, s, vt = torch.linalg.svd(torch.einsum("sphdc,spgec->shgde", goal, maps.unflatten(0, (2, 2))))
            order = _assign(s.sum((0, -1)))
            rotation = (u @ vt)[[0, 0, 1, 1]][:, torch.arange(heads), order]  # [4, H, D, D]
            bias = wide(attn.qkv.bias).unflatten(0, (3, heads, -1))[:, order]
            maps = torch.einsum("phde,phec->phdc", rotation, maps[:, order])
            attn.qkv.weight.copy_(maps[:3].flatten(0, 2))
            attn.qkv.bias.copy_(torch.einsum("phde,phe->phd", rotation[:3], bias).flatten())
            attn.proj.weight.copy_(maps[3].flatten(0, 1).T)


def _maps(attn: Any) -> Tensor:
    """Queries, keys, values and the transposed projection of all heads, `[4, H, D, C]`."""
    maps: Tensor = wide(torch.cat([attn.qkv.weight, attn.proj.weight.T])).unflatten(0, (4, attn.num_heads, -1))
    return maps


def _assign(similarity: Tensor) -> Tensor:
    """The column for each row so that the sum of their similarities is largest, `[rows]`."""
    columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(columns).to(similarity.device)
