"""Set the whole matrices that blocks share: the donor's, their mean, or the least-squares fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.registry import family_named
from vitcompress.families.widths import Widths
from vitcompress.initialize.inputs import Call, run_recorded
from vitcompress.initialize.regression import ZERO, Moments, regress_near, total_of, wide
from vitcompress.plans.model import Group, Plan

Images = Callable[[], Iterable[Tensor]]
Matrices = Mapping[str, Tensor]


def start_first(student: nn.Module, teacher: nn.Module, plan: Plan, images: Images) -> None:
    """Keep the weights of each group's first block, which `apply_plan` put in place."""


def start_mean(student: nn.Module, teacher: nn.Module, plan: Plan, images: Images) -> None:
    """Set every shared parameter to its mean over the group's blocks, in place."""
    for group in filter(_shares_whole, plan.groups):
        for name in group.shared:
            if name.removesuffix(".weight") in group.ranks:
                continue  # fitted together with its factors
            parameters = [teacher.get_parameter(f"{block}.{name}") for block in group.blocks]
            _set(student, f"{group.donor}.{name}", torch.stack([wide(p.detach()) for p in parameters]).mean(0))


def start_calibrated(student: nn.Module, teacher: nn.Module, plan: Plan, images: Images) -> None:
    """Set every shared matrix to the least-squares fit of its blocks' layers, in place.

    Minimizes Σ_i E‖(W x_i + b_i') − (W_i x_i + b_i)‖² over W and the biases, where x_i is the input
    of the layer in the group's block i of the teacher. Private biases take up the mean error of
    each block, so W is fitted to centered inputs; a shared bias is fitted together with W. Computed
    in float64.

    Args:
        student: its shared matrices and the biases of those layers are set.
        teacher: in eval mode.
        plan: the student's plan.
        images: returns calibration batches `[B, C, H, W]`, on the teacher's device.

    Source: ours; ordinary multi-output least squares. See docs/explanation.md.
    """
    family = family_named(plan.family)
    fits = [
        (group, layer, _Fit()) for group in filter(_shares_whole, plan.groups) for layer in shared_layers(group, family)
    ]
    fit_of = {f"{block}.{layer}": (fit, block) for group, layer, fit in fits for block in group.blocks}

    def add_inputs(name: str, call: Call) -> None:
        fit, block = fit_of[name]
        moments = Moments()
        moments.add(call.input)
        fit.add(block, teacher.get_parameter(f"{name}.weight"), moments)

    run_recorded(teacher, images() if fits else (), fit_of, add_inputs)
    for group, layer, fit in fits:
        fit.solve(student, teacher, group, layer)


def shared_matrix(weights: Matrices, inputs: Matrices, products: Matrices) -> Tensor:
    """Return the matrix `[out, in]` that `start_calibrated` gives blocks with private biases.

    Args:
        weights: the layer's in the teacher, `[out, in]`, by block.
        inputs: second moments of its inputs, `[in, in]`, around their means where there are biases,
            by block.
        products: of each block's weights and inputs, `[out, in]`.
    """
    return regress_near(*(total_of(matrices.values()) / len(weights) for matrices in (inputs, products, weights)))


STARTS: Mapping[str, Callable[[nn.Module, nn.Module, Plan, Images], None]] = {
    "first": start_first,
    "mean": start_mean,
    "calibrated": start_calibrated,
}


@dataclass
class _Fit:
    """Sums over the inputs of one layer in all blocks of a group, with no matrix per block."""

    inputs: Tensor = ZERO  # Σ_i Σ x xᵀ, [D, D]
    targets: Tensor = ZERO  # Σ_i W_i Σ x xᵀ, [O, D]
    sums: dict[str, Tensor] = field(default_factory=dict)  # Σ x per block
    count: dict[str, float | Tensor] = field(default_factory=dict)

    def add(self, block: str, weight: Tensor, moments: Moments) -> None:
        products = moments.count * moments.uncentered()
        self.inputs = self.inputs + products
        self.targets = self.targets + wide(weight.detach()) @ products
        self.sums[block] = self.sums.get(block, 0) + moments.x
        self.count[block] = self.count.get(block, 0) + moments.count

    def solve(self, student: nn.Module, teacher: nn.Module, group: Group, layer: str) -> None:
        """Set one layer of the group in the student, in place."""
        linears = {block: teacher.get_submodule(f"{block}.{layer}") for block in group.blocks}
        is_shared = f"{layer}.bias" in group.shared
        weight, biases = self.matrix(linears, shared_bias=is_shared)
        _set(student, f"{group.donor}.{layer}.weight", weight)
        for block, bias in zip(group.blocks[:1] if is_shared else group.blocks, biases, strict=False):
            _set(student, f"{block}.{layer}.bias", bias)

    def matrix(self, linears: Mapping[str, nn.Module], *, shared_bias: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the best matrix, and the bias of each block, of all blocks, or none."""
        weights = torch.stack([wide(linear.weight.detach()) for linear in linears.values()])  # type: ignore[operator]
        means = torch.stack([self.sums[block] / self.count[block] for block in linears])  # [G, D]
        count = sum(self.count.values())
        moment, target = self.inputs / count, self.targets / count  # averages over blocks and tokens
        if next(iter(linears.values())).bias is None:
            return regress_near(moment, target, weights.mean(0)), []
        biases = torch.stack([wide(linear.bias.detach()) for linear in linears.values()])  # type: ignore[operator]
        outputs = torch.einsum("god,gd->go", weights, means) + biases  # mean output per block
        if shared_bias:
            mean_in, mean_out = means.mean(0), outputs.mean(0)
            target = target + torch.einsum("go,gd->od", biases, means) / len(means)
            w = regress_near(moment - mean_in.outer(mean_in), target - mean_out.outer(mean_in), weights.mean(0))
            return w, [mean_out - w @ mean_in]
        centered = moment - torch.einsum("gd,ge->de", means, means) / len(means)
        explained = torch.einsum("god,gd,ge->oe", weights, means, means) / len(means)
        w = regress_near(centered, target - explained, weights.mean(0))
        return w, [output - w @ mean for output, mean in zip(outputs, means, strict=True)]


def shared_layers(group: Group, family: Family) -> list[str]:
    """Return the linear layers whose matrices a group shares without factors, as named in a block.

    Position tables are not linear layers.
    """
    names = [name.removesuffix(".weight") for name in group.shared if family.weights.fullmatch(name)]
    return [name for name in names if name not in group.ranks]


def _shares_whole(group: Group) -> bool:
    """Return whether blocks share parameters and are not narrow; `blockwise` starts narrow ones."""
    return len(group.blocks) > 1 and group.widths == Widths()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(value)
