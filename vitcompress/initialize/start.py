"""Set the starting weights of a student, or of one of its groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import layers_called
from vitcompress.initialize.align import Turns
from vitcompress.initialize.factors import fit_factors, start_factors
from vitcompress.initialize.importance import TokenWeights
from vitcompress.initialize.regression import Moments
from vitcompress.initialize.walk import BlockInputs, convert_block, run_block, start_in_order
from vitcompress.initialize.whole import STARTS, fit_whole, shared_layers
from vitcompress.plans.model import Group, Plan


def needs_images(plan: Plan, method: str) -> bool:
    """Whether the starts of a plan are fitted to images."""
    return any(not group.is_plain or (method == "calibrated" and len(group.blocks) > 1) for group in plan.groups)


def start_student(
    student: nn.Module, teacher: nn.Module, plan: Plan, images: Callable[[], Iterable[Tensor]], method: str
) -> None:
    """Set the student's starting weights, in place.

    Args:
        student: as `apply_plan` built it from a copy of the teacher.
        teacher: in eval mode, on the student's device.
        plan: the student's.
        images: gives calibration batches `[B, C, H, W]`, the same each time.
        method: start of whole shared matrices, a key of `STARTS`.
    """
    STARTS[method](student, teacher, plan, images)
    if needs_images(plan, "first"):
        start_factors(student, teacher, plan, images())
        start_in_order(student, teacher, plan, images())


def start_group(
    student: nn.Module,
    teacher: nn.Module,
    group: Group,
    family: Family,
    inputs: Mapping[str, BlockInputs],
    weights: TokenWeights,
    seen: dict[Any, Any],
    source: nn.Module,
    turns: Turns,
) -> None:
    """Set the start of one group alone, for the inputs that its blocks have in the teacher, in place.

    Args:
        student: has the group, and may have the teacher's own modules elsewhere.
        teacher: in eval mode.
        group: of the student, not of several narrow blocks.
        family: of the teacher.
        inputs: of the group's blocks in the teacher.
        weights: what each token counts in their fits.
        seen: moments of the same inputs that were taken for other ways of making the same part of the same block, by
            block; those that are new are added.
        source: the model that the group was made of: the teacher, or turned.
        turns: how; empty where it was not.
    """
    with torch.no_grad(), layers_called(student), layers_called(teacher):
        if len(group.blocks) == 1:
            convert_block(
                student.get_submodule(group.donor), teacher.get_submodule(group.donor), group, family,
                inputs[group.donor], weights[group.donor], seen.setdefault(group.donor, {}),
            )  # fmt: skip
            return
        layers = [*shared_layers(group, family), *group.ranks]
        for block in group.blocks:
            own = {layer: Moments() for layer in layers if f"{block}.{layer}" not in seen}
            for args, kwargs in inputs[block] if own else ():
                taken, _, _ = run_block(teacher.get_submodule(block), args[0], args[1:], kwargs, inputs=tuple(own))
                for layer, found in own.items():
                    found.add(taken[layer])
            seen.update({f"{block}.{layer}": found for layer, found in own.items()})
        moments = {f"{block}.{layer}": seen[f"{block}.{layer}"] for block in group.blocks for layer in layers}
        moments.update({name: moments[name].turned(turn) for name, turn in turns.items() if name in moments})
        fit_whole(student, source, family, group, moments)
        fit_factors(student, source, family, group, moments)
