"""Make a plan from a model and a `PlanRecipe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from vitcompress.errors import PlanError, raise_faults, shorten
from vitcompress.families.base import Family
from vitcompress.families.narrow import full_widths
from vitcompress.families.registry import family_named, family_of
from vitcompress.families.widths import Widths
from vitcompress.plans.grouping import BlockKind, group_blocks
from vitcompress.plans.model import Group, Plan
from vitcompress.plans.sizes import size_of
from vitcompress.recipe import TRANSFORMS, PlanRecipe


def make_plan(model: nn.Module, recipe: PlanRecipe, *, name: str, store: str = "source") -> Plan:
    """Decide what the blocks of `model` share and what their layers consist of.

    Args:
        model: the source, on any device, including meta.
        recipe: groups, biases, factors, widths and transformations to plan.
        name: the model's name in error messages.
        store: number format of the student's file, a key of `STORES`.

    Returns:
        A plan whose sizes are those of the student that `apply_plan` builds.

    Raises:
        ModelError: the model belongs to no family.
        PlanError: the recipe does not fit the model; lists every fault.
    """
    family = family_of(model, name)
    shared = _shared_names(model, family, recipe, name)
    kinds = {
        block: BlockKind(family.stage(block), tuple((n, model.get_parameter(f"{block}.{n}").shape) for n in names))
        for block, names in shared.items()
    }
    groups = [_make_group(model, family, blocks, shared[blocks[0]], recipe) for blocks in group_blocks(recipe, kinds)]
    transforms = _default_transforms(family, groups) if recipe.transforms is None else recipe.transforms
    faults = [
        (f"--transforms {transform}: {fault}.", "Leave it out of --transforms.")
        for transform in transforms
        if (fault := _transform_fault(family, transform, model, list(shared), name))
    ]
    faults += _rank_faults(model, groups, recipe, name) + _width_faults(groups, transforms, recipe, name)
    raise_faults(PlanError, faults)
    return plan_of(model, family, groups, transforms, recipe.token_kernel, store)


def plan_of(
    model: nn.Module,
    family: Family,
    groups: Sequence[Group],
    transforms: tuple[str, ...],
    token_kernel: int,
    store: str = "source",
) -> Plan:
    """Return the plan of groups that are known to fit, with its sizes.

    Args:
        model: the source, on any device, including meta.
        family: family of the model.
        groups: groups that together hold every block once.
        transforms: transformations of every block.
        token_kernel: kernel size of the token convolution, in patches.
        store: number format of the student's file, a key of `STORES`.
    """
    size = size_of(model, family, groups, transforms, token_kernel, store)
    return Plan(family.name, tuple(groups), transforms, token_kernel, size)


def with_sizes_on(plan: Plan, model: nn.Module, store: str = "source") -> Plan:
    """Return `plan` with its sizes on `model`, which may have another head or image size.

    Args:
        plan: plan of a model with the same blocks.
        model: a model without sharing, on any device, including meta.
        store: number format of the student's file, a key of `STORES`.
    """
    return plan_of(model, family_named(plan.family), plan.groups, plan.transforms, plan.token_kernel, store)


def with_student_bytes(plan: Plan, student_bytes: int) -> Plan:
    """Return `plan` with the student's actual bytes instead of the computed ones.

    Args:
        plan: any plan.
        student_bytes: bytes of the student's tensors in its file.
    """
    ratio = round(plan.size.teacher_bytes / student_bytes, 4)
    return replace(plan, size=replace(plan.size, student_bytes=student_bytes, bytes_ratio=ratio))


def layer_shapes(family: Family, block: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Return the shapes `[out, in]` of a block's linear layers, by their names inside the block.

    Args:
        family: family of the model.
        block: any block of the source.
    """
    return {
        n.removesuffix(".weight"): (p.shape[0], p.shape[1])
        for n, p in block.named_parameters()
        if family.weights.fullmatch(n)
    }


def _shared_names(model: nn.Module, family: Family, recipe: PlanRecipe, name: str) -> dict[str, tuple[str, ...]]:
    """Return the names, inside each block, of the parameters that its group shares.

    Raises:
        PlanError: a block has no matrices that can be shared.
    """
    shared = {
        block: family.shared_names(
            model.get_submodule(block), share_biases=recipe.share_biases, share_tables=recipe.share_tables
        )
        for block in family.block_names(model)
    }
    for block, names in shared.items():
        if not names:
            block_type = type(model.get_submodule(block)).__name__
            raise PlanError(
                f"{name}: blocks of type {block_type} have no matrices that can be shared.",
                hint="Choose a model whose blocks have attn.qkv, attn.proj, mlp.fc1 and mlp.fc2.",
            )
    return shared


def _make_group(
    model: nn.Module, family: Family, blocks: tuple[str, ...], shared: tuple[str, ...], recipe: PlanRecipe
) -> Group:
    """Return the group of `blocks` with the factors and widths of the recipe."""
    block = model.get_submodule(blocks[0])
    rank = recipe.adapter_rank or recipe.basis
    ranks: dict[str, int] = {}
    if rank and not (recipe.matrices and len(blocks) == 1):  # factors add nothing to a matrix that is not shared
        ranks = dict.fromkeys(layer_shapes(family, block), rank)
    if not recipe.matrices:
        shared = tuple(n for n in shared if n.removesuffix(".weight") not in ranks)
    widths = Widths()
    if recipe.width is not None:
        full = full_widths(block, family.narrow_attention)
        widths = Widths(*(w and max(1, round(w * recipe.width)) for w in (full.hidden, full.qk, full.v)))
    return Group(blocks, shared, ranks, tuple(ranks) if recipe.basis else (), widths)


def _default_transforms(family: Family, groups: Sequence[Group]) -> tuple[str, ...]:
    """Return the default transformations, which let blocks that share whole matrices differ.

    Empty if no blocks do.
    """
    shares = any(len(group.blocks) > 1 and any(map(family.weights.fullmatch, group.shared)) for group in groups)
    return TRANSFORMS if shares else ()


def _rank_faults(model: nn.Module, groups: Sequence[Group], recipe: PlanRecipe, name: str) -> list[tuple[str, str]]:
    """Return why the model cannot have the requested factors, as `(message, hint)` pairs."""
    faults = []
    flag, rank = ("--adapter-rank", recipe.adapter_rank) if recipe.adapter_rank else ("--basis", recipe.basis)
    if not rank:
        return []
    for group in groups:
        full_ranks = {layer: min(model.get_parameter(f"{group.donor}.{layer}.weight").shape) for layer in group.ranks}
        if full_ranks and rank > min(full_ranks.values()):
            layer = min(full_ranks, key=full_ranks.__getitem__)
            faults.append((
                f"{flag} {rank}: {group.donor}.{layer} of {name} has rank {full_ranks[layer]} at most.",
                f"Use at most {flag} {full_ranks[layer]}.",
            ))  # fmt: skip
            break
    if recipe.matrices and all(len(group.blocks) == 1 for group in groups):
        faults.append((
            f"{flag} {rank}: every block keeps its own matrices, so there is nothing to add factors to.",
            "Share matrices with --share 2 or more, or replace them by factors with --no-matrices (plain low rank).",
        ))  # fmt: skip
    return faults


def _width_faults(
    groups: Sequence[Group], transforms: Sequence[str], recipe: PlanRecipe, name: str
) -> list[tuple[str, str]]:
    """Return why the model cannot have the requested widths, as `(message, hint)` pairs."""
    faults = []
    if recipe.width is not None and all(group.widths == Widths() for group in groups):
        faults.append((
            f"--width {recipe.width:g}: the blocks of {name} have neither a plain MLP nor plain attention.",
            "Leave out --width.",
        ))  # fmt: skip
    if "rpe" in transforms and any(group.widths.qk for group in groups):
        faults.append((
            "--transforms rpe: its table has as many channels as a full head, but --width makes heads narrower.",
            "Leave out one of the two.",
        ))  # fmt: skip
    return faults


def _transform_fault(family: Family, transform: str, model: nn.Module, blocks: Sequence[str], name: str) -> str:
    """Return why the first unsuitable block is unsuitable; empty if all are suitable."""
    if transform not in family.transforms:
        return f"the {family.name} family only has {shorten(family.transforms)}"
    for block in blocks:
        if fault := family.transforms[transform].fault(model, model.get_submodule(block)):
            return f"{block} of {name} cannot have it: {fault}"
    return ""
