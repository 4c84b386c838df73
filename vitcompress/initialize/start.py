"""Set the starting weights of a student, or of one of its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import layers_called
from vitcompress.initialize.align import AlignedGroup
from vitcompress.initialize.blockwise import BlockFit, start_in_order
from vitcompress.initialize.factors import fit_factors, start_factors
from vitcompress.initialize.importance import TokenWeights
from vitcompress.initialize.inputs import BlockInput, run_block
from vitcompress.initialize.regression import Moments
from vitcompress.initialize.shared_matrices import STARTS, fit_whole, shared_layers
from vitcompress.plans.model import Group, Plan


def needs_images(plan: Plan, method: str) -> bool:
    """Whether the start of a plan's student is fitted to images.

    Args:
        plan: the student's plan.
        method: start of whole shared matrices, a key of `STARTS`.
    """
    return any(not group.is_plain or (method == "calibrated" and len(group.blocks) > 1) for group in plan.groups)


def start_student(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Callable[[], Iterable[Tensor]], method: str
) -> None:
    """Set the student's starting weights, in place.

    Args:
        student: as `apply_plan` built it from a copy of the teacher.
        teacher: in eval mode, on the student's device.
        plan: the student's plan.
        images: returns calibration batches `[B, C, H, W]`, the same ones each time.
        method: start of whole shared matrices, a key of `STARTS`.
    """
    STARTS[method](student, teacher, plan, images)
    if needs_images(plan, "first"):
        start_factors(student, teacher, plan, images())
        start_in_order(student, teacher, plan, images())


@dataclass(frozen=True)
class Calibration:
    """A teacher and what its blocks receive for calibration images.

    Attributes:
        teacher: in eval mode.
        family: of the teacher.
        inputs: arguments of each block, one entry per batch, by block.
        weights: how much each token counts, by block and layer.
        cache: moments of these inputs that starts of other groups can use again, by block; new ones
            are added.
    """

    teacher: nn.Module
    family: Family
    inputs: Mapping[str, Sequence[BlockInput]]
    weights: TokenWeights
    cache: dict[str, dict[str, Any]] = field(default_factory=dict)


def start_group(student: nn.Module, group: Group, calibration: Calibration, source: AlignedGroup) -> None:
    """Set the start of one group, fitted to its blocks' inputs in the teacher, in place.

    Args:
        student: contains the group; its other blocks may be the teacher's own modules.
        group: any group but one of several narrow blocks.
        calibration: the teacher and its inputs.
        source: the model that the group was made from: the teacher, or a copy with the group's
            blocks aligned.
    """
    teacher, family, cache = calibration.teacher, calibration.family, calibration.cache
    with torch.no_grad(), layers_called(student), layers_called(teacher):
        if len(group.blocks) == 1:
            block, batches = group.donor, calibration.inputs[group.donor]
            given = batches[0]._replace(x=torch.cat([batch.x for batch in batches]))
            weights, moments = calibration.weights[block], cache.setdefault(block, {})
            fit = BlockFit(student.get_submodule(block), teacher.get_submodule(block), weights, given, cache=moments)
            fit.run(group, family)
            return
        layers = [*shared_layers(group, family), *group.ranks]
        for block in group.blocks:
            _add_moments(calibration, block, layers)
        by_name = {f"{block}.{layer}": cache[block][layer] for block in group.blocks for layer in layers}
        by_name.update({name: by_name[name].mapped(by) for name, by in source.input_maps.items() if name in by_name})
        fit_whole(student, source.model, family, group, by_name)
        fit_factors(student, source.model, family, group, by_name)


def _add_moments(calibration: Calibration, block: str, layers: Sequence[str]) -> None:
    """Add the moments of a block's layer inputs to the cache, in place, where they are missing."""
    cache = calibration.cache.setdefault(block, {})
    missing = {layer: Moments() for layer in layers if layer not in cache}
    for given in calibration.inputs[block] if missing else ():
        calls, _ = run_block(calibration.teacher.get_submodule(block), given, missing)
        for layer, moments in missing.items():
            moments.add(calls[layer].input)
    cache.update(missing)
