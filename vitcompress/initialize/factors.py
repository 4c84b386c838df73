"""Which factors does a group of several blocks start from?  Those that keep most of what its layers do.

    adapters   min over B, U_i, V_i of  Σ_i E‖(W_i − B − U_i V_i) x_i‖²     alternately: B given the residuals, and back
    bases      W_i = U_i S (layers that read the stream), S U_i (that write to it): S from an SVD of all blocks' layers

x_i is the input of block i's layer in the teacher. Private biases take up what is left of the mean.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.find import family_named
from vitcompress.families.insertion import layers_called
from vitcompress.initialize.inputs import recording
from vitcompress.initialize.regression import Moments, leading, low_rank, regress_near, roots
from vitcompress.layers.factored import FactoredLinear
from vitcompress.plans.model import Group, Plan

ROUNDS = 6


def start_factors(student: nn.Module, teacher: nn.Module, plan: Plan, images: Iterable[Tensor]) -> None:
    """Set the factors of every group of several blocks, and the matrices that they are added to, in place.

    Args:
        student: its shared matrices are where the rounds begin.
        teacher: in eval mode.
        plan: the student's.
        images: calibration batches `[B, C, H, W]`, on the teacher's device.

    Source: ours; the whitening of arXiv:2403.07378, here of residuals from a shared matrix.
    """
    groups = [group for group in plan.groups if len(group.blocks) > 1 and group.ranks]
    if not groups:
        return
    moments = input_moments(teacher, groups, images)
    family = family_named(plan.family)
    for group in groups:
        fit_factors(student, teacher, family, group, moments)


def fit_factors(
    student: nn.Module, teacher: nn.Module, family: Family, group: Group, moments: Mapping[str, Moments]
) -> None:
    """Set the factors of one group of several blocks, and the matrices that they are added to, in place.

    Args:
        student: its shared matrices are where the rounds begin.
        teacher: whose layers they are fitted to.
        family: of the teacher.
        group: of the student's plan.
        moments: of the inputs of the group's layers in the teacher, by the layers' full names.
    """
    for layer, rank in group.ranks.items():
        inputs = {block: moments[f"{block}.{layer}"] for block in group.blocks}
        _start_layer(student, teacher, family, group, layer, rank, inputs)


def input_moments(teacher: nn.Module, groups: Iterable[Group], images: Iterable[Tensor]) -> dict[str, Moments]:
    """Moments of the inputs of the groups' layers that have factors, by the layers' full names."""
    moments = {f"{block}.{layer}": Moments() for group in groups for block in group.blocks for layer in group.ranks}
    with (
        torch.no_grad(),
        layers_called(teacher),
        recording(teacher, moments, lambda name, call: moments[name].add(call.input)),
    ):
        for batch in images:
            teacher(batch)
    return moments


def _start_layer(
    student: nn.Module,
    teacher: nn.Module,
    family: Family,
    group: Group,
    layer: str,
    rank: int,
    inputs: Mapping[str, Moments],
) -> None:
    """Set one layer of all of a group's blocks."""
    weights = {b: teacher.get_submodule(f"{b}.{layer}").weight.detach().double() for b in group.blocks}  # type: ignore[operator]
    own_bias = getattr(student.get_submodule(f"{group.donor}.{layer}"), "bias", None) is not None
    own_bias = own_bias and f"{layer}.bias" not in group.shared  # it takes up the mean, so only the rest counts
    moments = {block: found.covariance() if own_bias else found.second() for block, found in inputs.items()}
    whole = group.whole(layer)
    solve = partial(
        _bases if layer in group.bases else _adapters, rank=rank, writes=bool(family.writes.fullmatch(layer))
    )
    base = torch.zeros_like(weights[group.donor])
    if whole:
        base = student.get_parameter(f"{group.donor}.{layer}.base").detach().double()
    factors = solve({block: w - base for block, w in weights.items()}, moments)
    for _ in range(ROUNDS if whole else 0):
        residues = {b: w - up @ down for (b, w), (up, down) in zip(weights.items(), factors, strict=True)}
        base = _fit_base(residues, moments)
        factors = solve({block: w - base for block, w in weights.items()}, moments)
    with torch.no_grad():
        for block, (up, down) in zip(group.blocks, factors, strict=True):
            made: Any = student.get_submodule(f"{block}.{layer}")
            assert isinstance(made, FactoredLinear)
            made.up.copy_(up)
            made.down.copy_(down)
            if whole:
                made.base.copy_(base)  # type: ignore[union-attr]
            if own_bias:
                own: Any = teacher.get_submodule(f"{block}.{layer}")
                made.bias.copy_(own.bias.double() + (weights[block] - base - up @ down) @ inputs[block].mean)


def _fit_base(residues: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Tensor:
    """The matrix nearest to all `residues`, each weighted by its own inputs."""
    total, prior = _total(moments.values()), _total(residues.values()) / len(residues)
    return regress_near(total, _total(residues[block] @ moments[block] for block in residues), prior)


def _total(matrices: Iterable[Tensor]) -> Tensor:
    """Their sum, without holding them side by side: of a large model that would be gigabytes."""
    return functools.reduce(torch.add, matrices)


def _adapters(
    residues: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, rank: int, writes: bool
) -> list[tuple[Tensor, Tensor]]:
    return [low_rank(residue, moments[block], rank) for block, residue in residues.items()]


def _bases(
    residues: Mapping[str, Tensor], moments: Mapping[str, Tensor], *, rank: int, writes: bool
) -> list[tuple[Tensor, Tensor]]:
    return list((_written if writes else _read)(residues, moments, rank))


def _read(residues: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """W_i ≈ U_i S: the inputs that matter to all blocks' layers."""
    root, inverse = roots(_total(moments.values()) / len(moments))
    gram = _total(residue.T @ residue for residue in residues.values())
    basis = leading(root @ gram @ root, rank).T @ inverse
    for block, residue in residues.items():
        seen = moments[block] @ basis.T
        yield torch.linalg.solve(basis @ seen, (residue @ seen).T).T, basis


def _written(
    residues: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """W_i ≈ S U_i: the directions of the stream that all blocks' layers write to."""
    basis = leading(_total(r @ moments[block] @ r.T for block, r in residues.items()), rank)
    for residue in residues.values():
        yield basis, basis.T @ residue
