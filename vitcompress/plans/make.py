"""From what was asked for to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from vitcompress.errors import PlanError, raise_faults, shorten
from vitcompress.families.base import Family
from vitcompress.families.find import family_named, family_of
from vitcompress.families.narrow import full_widths
from vitcompress.families.widths import Widths
from vitcompress.plans.grouping import Kind, group_blocks
from vitcompress.plans.model import Group, Plan
from vitcompress.plans.sizes import size_of
from vitcompress.recipe import TRANSFORMS, PlanRecipe


def make_plan(model: nn.Module, recipe: PlanRecipe, *, name: str, store: str = "source") -> Plan:
    """Decide what `model`'s blocks share and what their layers are made of.

    Args:
        model: the teacher, on any device; meta will do.
        recipe: groups, biases, factors, widths and transformations asked for.
        name: what the user called the model, for messages.
        store: how the file holds the student, a key of `STORES`.

    Returns:
        A plan whose sizes are those of the student that `apply_plan` builds.

    Raises:
        ModelError: the model is of no known family.
        PlanError: what was asked for does not fit the model; every fault at once.
    """
    family = family_of(model, name)
    shared = {
        block: family.shared_names(
            model.get_submodule(block), share_biases=recipe.share_biases, share_tables=recipe.share_tables
        )
        for block in family.block_names(model)
    }
    for block, names in shared.items():
        if not names:
            kind = type(model.get_submodule(block)).__name__
            raise PlanError(
                f"{name}: blocks of type {kind} have no matrices that can be shared.",
                hint="Models whose blocks have attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 can be compressed.",
            )
    kinds = {
        block: Kind(family.stage(block), tuple((n, model.get_parameter(f"{block}.{n}").shape) for n in names))
        for block, names in shared.items()
    }
    groups = tuple(_group(model, family, blocks, shared[blocks[0]], recipe) for blocks in group_blocks(recipe, kinds))
    transforms = _transforms(family, groups) if recipe.transforms is None else recipe.transforms
    faults = [
        (f"--transforms {transform}: {fault}.", "Leave it out of --transforms.")
        for transform in transforms
        if (fault := _transform_fault(family, transform, model, list(shared), name))
    ]
    faults += _faults_of_factors(model, groups, transforms, recipe, name)
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
    """The plan of groups that are known to fit.

    Args:
        model: the teacher, on any device; meta will do.
        family: of the model.
        groups: every block of the model, each in one.
        transforms: of every block.
        token_kernel: of the token convolution.
        store: how the file holds the student, a key of `STORES`.
    """
    size = size_of(model, family, groups, transforms, token_kernel, store)
    return Plan(family.name, tuple(groups), transforms, token_kernel, size)


def measured_on(plan: Plan, model: nn.Module, store: str = "source") -> Plan:
    """The same plan with the sizes of `model`, of the same blocks but another head or image size.

    Args:
        plan: of a model with the same blocks.
        model: nothing shared in it yet, on any device; meta will do.
        store: how the file holds the student, a key of `STORES`.
    """
    return plan_of(model, family_named(plan.family), plan.groups, plan.transforms, plan.token_kernel, store)


def weighed(plan: Plan, student_bytes: int) -> Plan:
    """The same plan with the bytes that its student came to take, where that is known."""
    ratio = round(plan.size.teacher_bytes / student_bytes, 4)
    return replace(plan, size=replace(plan.size, student_bytes=student_bytes, bytes_ratio=ratio))


def layer_shapes(family: Family, block: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Shapes `[out, in]` of a block's linear layers, by their names inside it; position tables are none."""
    return {
        n.removesuffix(".weight"): (p.shape[0], p.shape[1])
        for n, p in block.named_parameters()
        if family.weights.fullmatch(n)
    }


def _group(
    model: nn.Module, family: Family, blocks: tuple[str, ...], shared: tuple[str, ...], recipe: PlanRecipe
) -> Group:
    """What the recipe makes of some blocks."""
    block = model.get_submodule(blocks[0])
    rank = recipe.adapter_rank or recipe.basis
    ranks: dict[str, int] = {}
    if rank and not (recipe.matrices and len(blocks) == 1):  # a matrix of its own has nothing to gain from factors
        ranks = dict.fromkeys(layer_shapes(family, block), rank)
    if not recipe.matrices:
        shared = tuple(n for n in shared if n.removesuffix(".weight") not in ranks)
    widths = Widths()
    if recipe.width is not None:
        full = full_widths(block, family.narrow_attention)
        widths = Widths(*(w and max(1, round(w * recipe.width)) for w in (full.hidden, full.qk, full.v)))
    return Group(blocks, shared, ranks, tuple(ranks) if recipe.basis else (), widths)


def _transforms(family: Family, groups: Sequence[Group]) -> tuple[str, ...]:
    """The transformations where none are asked for: they tell blocks apart that share whole matrices, and no others."""
    shares = any(len(group.blocks) > 1 and any(map(family.weights.fullmatch, group.shared)) for group in groups)
    return TRANSFORMS if shares else ()


def _faults_of_factors(
    model: nn.Module, groups: Sequence[Group], transforms: Sequence[str], recipe: PlanRecipe, name: str
) -> list[tuple[str, str]]:
    """Why factors and widths cannot be as asked, as `(message, hint)` pairs."""
    faults = []
    flag, rank = ("--adapter-rank", recipe.adapter_rank) if recipe.adapter_rank else ("--basis", recipe.basis)
    for group in groups:
        shapes = {layer: min(model.get_parameter(f"{group.donor}.{layer}.weight").shape) for layer in group.ranks}
        if rank and shapes and rank > min(shapes.values()):
            layer = min(shapes, key=shapes.__getitem__)
            faults.append((
                f"{flag} {rank}: {group.donor}.{layer} of {name} has rank {shapes[layer]} at most.",
                f"At most {flag} {min(shapes.values())}.",
            ))  # fmt: skip
            break
    if rank and recipe.matrices and all(len(group.blocks) == 1 for group in groups):
        faults.append((
            f"{flag} {rank}: every block keeps its own matrices, so there is nothing to add to them.",
            "--share 2 or more shares them; --no-matrices leaves the factors alone, which is plain low rank.",
        ))  # fmt: skip
    if recipe.width is not None and all(group.widths == Widths() for group in groups):
        faults.append((
            f"--width {recipe.width:g}: the blocks of {name} have neither a plain MLP nor plain attention.",
            "Leave it out.",
        ))  # fmt: skip
    if "rpe" in transforms and any(group.widths.qk for group in groups):
        faults.append(("--transforms rpe: its table has as many channels as a head, which --width takes away.",
                       "Leave one of them out."))  # fmt: skip
    return faults


def _transform_fault(family: Family, transform: str, model: nn.Module, blocks: Sequence[str], name: str) -> str:
    """Why the first of the `blocks` that cannot have the transformation cannot; empty where all can."""
    if transform not in family.transforms:
        return f"the {family.name} family has {shorten(family.transforms)}"
    for block in blocks:
        if fault := family.transforms[transform].fault(model, model.get_submodule(block)):
            return f"{block} of {name} cannot have it: {fault}"
    return ""
