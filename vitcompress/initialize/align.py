"""Of the models that compute what a teacher does, which has the blocks of a group most alike?

    MLP      neurons may stand in any order                            fc1 → P fc1,  fc2 → fc2 Pᵀ
    heads    may stand in any order; within one, queries and keys      q → R q,  k → R k
             may turn together, and values with the projection         v → S v,  proj → proj Sᵀ

Blocks were trained apart, so what they have in common stands in other places in each: their mean, or one matrix with
small residuals, is far from all of them unless they are turned towards one another first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from vitcompress.families.narrow import plain_attention, plain_mlp
from vitcompress.plans.model import Group, Plan

ROUNDS = 3
"""The first turns all blocks towards the first, the others towards their mean."""

InputMaps = Mapping[str, Tensor]
"""How aligning changes the inputs of layers, by the layers' full names: a permutation `[D]` or a rotation `[D, D]`."""


@dataclass(frozen=True)
class AlignedGroup:
    """A model in which the blocks of a group may be aligned.

    Attributes:
        model: computes what the teacher does.
        input_maps: how the inputs of its layers differ from the teacher's; empty where nothing was aligned.
    """

    model: nn.Module
    input_maps: InputMaps = field(default_factory=dict)


def aligned(teacher: nn.Module, plan: Plan) -> nn.Module:
    """A model that computes what the teacher does, with the blocks that share matrices turned towards one another.

    Args:
        teacher: not changed.
        plan: of a student.

    Returns:
        A copy; the teacher itself where nothing can be turned: blocks that share no matrices stay as they are, and
        so do layers that are not timm's plain ones.

    Source: ours. Neurons by assignment: Ainsworth et al. 2023, arXiv:2209.04836, Sec. 3.2; heads by orthogonal
        Procrustes: Schönemann 1966.
    """
    if not any(_turnable(teacher, group) for group in plan.groups):
        return teacher
    turned = copy.deepcopy(teacher)
    for group in plan.groups:
        align_group(turned, group)
    return turned


def align_group(model: nn.Module, group: Group) -> InputMaps:
    """Turn the blocks of a group towards one another, in place; the model computes the same.

    Args:
        model: has the teacher's blocks.
        group: of a plan of it.

    Returns:
        What the layers whose inputs are others now get.
    """
    turns: dict[str, Tensor] = {}
    with torch.no_grad():
        for part, (layer, align) in _turnable(model, group).items():
            found = align([model.get_submodule(f"{block}.{part}") for block in group.blocks])
            turns.update({f"{block}.{part}.{layer}": turn for block, turn in zip(group.blocks, found, strict=True)})
    return turns


def _turnable(model: nn.Module, group: Group) -> dict[str, tuple[str, Callable[[Sequence[Any]], list[Tensor]]]]:
    """The parts of a group's blocks that can be turned: the layer whose inputs turn, and what does it."""
    if len(group.blocks) == 1:
        return {}
    kinds = {
        "mlp": ("fc1", "fc2", plain_mlp, _align_neurons),
        "attn": ("qkv", "proj", plain_attention, _align_heads),
    }
    return {
        part: (writes, align)
        for part, (reads, writes, is_plain, align) in kinds.items()
        if any(f"{part}.{layer}.weight" in group.shared for layer in (reads, writes))
        and all(is_plain(getattr(model.get_submodule(block), part, None)) for block in group.blocks)
    }


def _align_neurons(mlps: Sequence[Any]) -> list[Tensor]:
    """Order the neurons of some MLPs, in place; returns the orders `[M]`."""
    orders = [torch.arange(mlp.fc1.out_features, device=mlp.fc1.weight.device) for mlp in mlps]
    for number in range(ROUNDS):
        each = torch.stack([torch.cat([mlp.fc1.weight, mlp.fc2.weight.T], 1) for mlp in mlps]).double()  # [G, M, 2·C]
        goal = each.mean(0) if number else each[0]
        for index, (mlp, rows) in enumerate(zip(mlps, each, strict=True)):
            order = _assigned(goal @ rows.T)
            mlp.fc1.weight.copy_(mlp.fc1.weight[order])
            mlp.fc1.bias.copy_(mlp.fc1.bias[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
            orders[index] = orders[index][order]
    return orders


def _align_heads(attns: Sequence[Any]) -> list[Tensor]:
    """Order and turn the heads of some attentions, in place; returns the rotations of what they attend to, `[C, C]`."""
    heads = attns[0].num_heads
    turned = [torch.eye(attn.proj.in_features, device=attn.proj.weight.device).double() for attn in attns]
    for number in range(ROUNDS):
        each = torch.stack([_maps(attn) for attn in attns])  # [G, 4, H, D, C]
        goal = (each.mean(0) if number else each[0]).unflatten(0, (2, 2))
        for index, (attn, maps) in enumerate(zip(attns, each, strict=True)):
            # for each pair of heads, what turns the second to the first: queries with keys, values with projection
            u, s, vt = torch.linalg.svd(torch.einsum("sphdc,spgec->shgde", goal, maps.unflatten(0, (2, 2))))
            order = _assigned(s.sum((0, -1)))
            turn = (u @ vt)[[0, 0, 1, 1]][:, torch.arange(heads), order]  # [4, H, D, D]
            bias = attn.qkv.bias.double().unflatten(0, (3, heads, -1))[:, order]
            maps = torch.einsum("phde,phec->phdc", turn, maps[:, order])
            attn.qkv.weight.copy_(maps[:3].flatten(0, 2))
            attn.qkv.bias.copy_(torch.einsum("phde,phe->phd", turn[:3], bias).flatten())
            attn.proj.weight.copy_(maps[3].flatten(0, 1).T)
            values = turned[index].unflatten(0, (heads, -1))[order]
            turned[index] = torch.einsum("hde,hec->hdc", turn[3], values).flatten(0, 1)
    return turned


def _maps(attn: Any) -> Tensor:
    """Queries, keys, values and the transposed projection of all heads, `[4, H, D, C]`."""
    maps: Tensor = torch.cat([attn.qkv.weight, attn.proj.weight.T]).double().unflatten(0, (4, attn.num_heads, -1))
    return maps


def _assigned(likeness: Tensor) -> Tensor:
    """Which column goes to each row so that the sum of what they have in common is largest."""
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1]).to(likeness.device)
