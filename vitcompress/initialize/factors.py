"""Fit the factors of groups of several blocks, and the shared matrices that they are added to.

    adapters   min over B, U_i, V_i of  Σ_i E‖(W_i − B − U_i V_i) x_i‖²,  B and the factors in turn
    bases      W_i = U_i S in layers that read the residual stream, S U_i in those that write to it;
               S from an SVD of all blocks' layers

x_i is the input of block i's layer in the teacher. Private biases take up the mean of the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.registry import family_named
from vitcompress.initialize.inputs import run_recorded
from vitcompress.initialize.regression import Moments, leading, low_rank, regress_near, roots, total_of, wide
from vitcompress.plans.model import Group, Plan

ROUNDS = 6


def start_factors(student: nn.Module, teacher: nn.Module, plan: Plan, images: Iterable[Tensor]) -> None:
    """Set the factors of groups of several blocks, and the matrices they are added to, in place.

    Args:
        student: the rounds begin from its shared matrices.
        teacher: in eval mode.
        plan: the student's plan.
        images: calibration batches `[B, C, H, W]`, on the teacher's device.

    Source: ours; the whitening is that of arXiv:2403.07378, here of residuals from a shared matrix.
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
    """Set the factors of one group of several blocks, and the matrices they are added to, in place.

    Args:
        student: the rounds begin from its shared matrices.
        teacher: the factors are fitted to its layers.
        family: of the teacher.
        group: of the student's plan.
        moments: moments of the inputs of the group's layers in the teacher, by the layer's full
            name.
    """
    for layer in group.ranks:
        inputs = {block: moments[f"{block}.{layer}"] for block in group.blocks}
        _fit_layer(student, teacher, family, group, layer, inputs)


def input_moments(teacher: nn.Module, groups: Iterable[Group], images: Iterable[Tensor]) -> dict[str, Moments]:
    """Compute the moments of the inputs of layers that have factors, by the layer's full name.

    Args:
        teacher: in eval mode.
        groups: of a plan for the teacher.
        images: batches `[B, C, H, W]`, on the teacher's device.
    """
    moments = {f"{block}.{layer}": Moments() for group in groups for block in group.blocks for layer in group.ranks}
    run_recorded(teacher, images, moments, lambda name, call: moments[name].add(call.input))
    return moments


def _fit_layer(
    student: nn.Module, teacher: nn.Module, family: Family, group: Group, layer: str, inputs: Mapping[str, Moments]
) -> None:
    """Set one layer in all of a group's blocks, in place."""
    weights = {b: wide(teacher.get_submodule(f"{b}.{layer}").weight.detach()) for b in group.blocks}  # type: ignore[operator]
    layers: dict[str, Any] = {b: student.get_submodule(f"{b}.{layer}") for b in group.blocks}
    # it takes up the mean of the error
    private_bias = layers[group.donor].bias is not None and f"{layer}.bias" not in group.shared
    moments = {block: m.covariance() if private_bias else m.second() for block, m in inputs.items()}
    whole = group.whole(layer)
    writes = bool(family.writes.fullmatch(layer))

    def fit(base: Tensor) -> list[tuple[Tensor, Tensor]]:
        residuals = {block: weight - base for block, weight in weights.items()}
        if layer in group.bases:
            return list((_fit_writers if writes else _fit_readers)(residuals, moments, group.ranks[layer]))
        return [low_rank(residual, moments[block], group.ranks[layer]) for block, residual in residuals.items()]

    base = wide(layers[group.donor].base.detach()) if whole else torch.zeros_like(weights[group.donor])
    factors = fit(base)
    for _ in range(ROUNDS if whole else 0):
        residuals = {b: w - up @ down for (b, w), (up, down) in zip(weights.items(), factors, strict=True)}
        base = _fit_base(residuals, moments)
        factors = fit(base)
    with torch.no_grad():
        for (block, factored), (up, down) in zip(layers.items(), factors, strict=True):
            factored.up.copy_(up)
            factored.down.copy_(down)
            if whole:
                factored.base.copy_(base)
            if private_bias:
                bias = wide(teacher.get_parameter(f"{block}.{layer}.bias"))
                factored.bias.copy_(bias + (weights[block] - base - up @ down) @ inputs[block].mean)


def _fit_base(residuals: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix nearest to all residuals, each weighted by its inputs."""
    total, prior = total_of(moments.values()), total_of(residuals.values()) / len(residuals)
    return regress_near(total, total_of(residuals[block] @ moments[block] for block in residuals), prior)


def _fit_readers(
    residuals: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """W_i ≈ U_i S, where S spans the inputs that matter to all blocks' layers."""
    basis = basis_of_readers(residuals, moments)[:rank]
    for block, residual in residuals.items():
        projected = moments[block] @ basis.T
        yield torch.linalg.solve(basis @ projected, (residual @ projected).T).T, basis


def basis_of_readers(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Tensor:
    """Return rows `[in, in]` of which the first r are the best shared factor of rank r.

    Args:
        weights: `[out, in]` by block.
        moments: second moments of the inputs, `[in, in]`, by block.
    """
    root, inverse = roots(total_of(moments.values()) / len(moments))
    gram = total_of(weight.T @ weight for weight in weights.values())
    return leading(root @ gram @ root, len(root)).T @ inverse


def _fit_writers(
    residuals: Mapping[str, Tensor], moments: Mapping[str, Tensor], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """W_i ≈ S U_i, where S spans the directions of the stream that all blocks' layers write to."""
    basis = basis_of_writers(residuals, moments)[:, :rank]
    for residual in residuals.values():
        yield basis, basis.T @ residual


def basis_of_writers(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> Tensor:
    """Return columns `[out, out]` of which the first r are the best shared factor of rank r.

    Arguments are those of `basis_of_readers`.
    """
    gram = total_of(weight @ moments[block] @ weight.T for block, weight in weights.items())
    return leading(gram, len(gram))
