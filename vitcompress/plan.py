"""What shares with what, and what is left?  Pure arithmetic on meta tensors: no weights are read.

deit_base, --share 4:     blocks  0 1 2 3 │ 4 5 6 7 │ 8 9 10 11
                          donor   ^         ^         ^
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from vitcompress.errors import PlanError, raise_faults, shorten
from vitcompress.families import Family, family_named, family_of
from vitcompress.quantize import STORES, stored_bytes
from vitcompress.recipe import DEFAULT_SHARE, PlanRecipe

_FROZEN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FROZEN)
class Group:
    """Consecutive blocks of one stage that use one set of parameters.

    Attributes:
        blocks: full names, in the order in which they run; the first is the donor.
        shared: names, inside a block, of the parameters they share.
    """

    blocks: Annotated[tuple[str, ...], Field(min_length=1)]
    shared: tuple[str, ...]

    @property
    def donor(self) -> str:
        """The block whose names the shared parameters are stored under."""
        return self.blocks[0]


@dataclass(frozen=True, config=_FROZEN)
class Size:
    """Parameters and bytes of teacher and student.

    Bytes are those of parameters and persistent buffers, each shared tensor once: of the teacher in the type they are
    held in, of the student as its file stores them. The file adds a header of some kilobytes.
    """

    teacher_params: int
    student_params: int
    params_ratio: float
    teacher_bytes: int
    student_bytes: int
    bytes_ratio: float


@dataclass(frozen=True, config=_FROZEN)
class Plan:
    """What of a model is shared and what is added to it.

    Attributes:
        family: name of the model's family.
        groups: every block of the model, in order, each in one group.
        transforms: names of the transformations of every block.
        token_kernel: k of the token convolution, in patches.
        size: parameters and bytes before and after.
    """

    family: str
    groups: tuple[Group, ...]
    transforms: tuple[str, ...]
    token_kernel: int
    size: Size

    @property
    def matrices(self) -> frozenset[str]:
        """Full names of the matrices that the student keeps, each under its donor's name."""
        return frozenset(
            f"{group.donor}.{name}" for group in self.groups for name in group.shared if name.endswith(".weight")
        )


def make_plan(model: nn.Module, recipe: PlanRecipe, *, name: str, store: str = "source") -> Plan:
    """Decide what `model`'s blocks share.

    Args:
        model: the teacher, on any device; meta will do.
        recipe: groups, biases and transformations asked for.
        name: what the user called the model, for messages.
        store: how the file holds the student, a key of `STORES`.

    Returns:
        A plan whose sizes are those of the student that `apply_plan` builds.

    Raises:
        ModelError: the model is of no known family.
        PlanError: the groups or transformations asked for do not fit the model; every fault at once.
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
        block: _Kind(family.stage(block), tuple((n, model.get_parameter(f"{block}.{n}").shape) for n in names))
        for block, names in shared.items()
    }
    chunks = _explicit_groups(recipe.groups, kinds) if recipe.groups is not None else _chunks(recipe, kinds)
    groups = [Group(chunk, shared[chunk[0]]) for chunk in chunks]
    faults = [
        (f"--transforms {transform}: {fault}.", "Leave it out of --transforms.")
        for transform in recipe.transforms
        if (fault := _transform_fault(family, transform, model, list(shared), name))
    ]
    raise_faults(PlanError, faults)
    size = _size(model, family, groups, recipe, store)
    return Plan(family.name, tuple(groups), recipe.transforms, recipe.token_kernel, size)


def measured_on(plan: Plan, model: nn.Module, store: str = "source") -> Plan:
    """The same plan with the sizes of `model`, of the same blocks but another head or image size.

    Args:
        plan: of a model with the same blocks.
        model: nothing shared in it yet, on any device; meta will do.
        store: how the file holds the student, a key of `STORES`.
    """
    return replace(plan, size=_size(model, family_named(plan.family), plan.groups, plan, store))


def weighed(plan: Plan, student_bytes: int) -> Plan:
    """The same plan with the bytes that its student came to take, where that is known."""
    ratio = round(plan.size.teacher_bytes / student_bytes, 4)
    return replace(plan, size=replace(plan.size, student_bytes=student_bytes, bytes_ratio=ratio))


@dataclass(frozen=True)
class _Kind:
    """What two blocks must have in common to share: their stage, and the shapes of what they share, by name."""

    stage: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


def _transform_fault(family: Family, transform: str, model: nn.Module, blocks: Sequence[str], name: str) -> str:
    """Why the first of the `blocks` that cannot have the transformation cannot; empty where all can."""
    if transform not in family.transforms:
        return f"the {family.name} family has {shorten(family.transforms)}"
    for block in blocks:
        if fault := family.transforms[transform].fault(model, model.get_submodule(block)):
            return f"{block} of {name} cannot have it: {fault}"
    return ""


def _chunks(recipe: PlanRecipe, kinds: Mapping[str, _Kind]) -> list[tuple[str, ...]]:
    """Cut the blocks into runs of `share`, all of one kind: the last run of a stage may be shorter."""
    blocks = list(kinds)
    share = recipe.share if recipe.share is not None else DEFAULT_SHARE
    if not blocks:
        raise PlanError("The model has 0 blocks, so there is nothing to share.")
    if share > len(blocks):
        raise PlanError(f"--share {share}: the model has {len(blocks)} blocks.", hint=f"At most --share {len(blocks)}.")
    chunks: list[tuple[str, ...]] = []
    for block in blocks:
        if chunks and len(chunks[-1]) < share and kinds[chunks[-1][0]] == kinds[block]:
            chunks[-1] += (block,)
        else:
            chunks.append((block,))
    return chunks


def _explicit_groups(text: str, kinds: Mapping[str, _Kind]) -> list[tuple[str, ...]]:
    """Read `0-3,4-7,8-11`: block numbers from zero, every block in one group, in order."""
    blocks = list(kinds)
    faults, expected = [], 0
    chunks: list[tuple[str, ...]] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if found is None:
            faults.append(f"{part.strip()!r} is not a block or a range like 0-3")
            continue
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            faults.append(f"{part.strip()} runs backwards")
            continue
        if first < expected:
            faults.append(f"{part.strip()} overlaps or comes after a later group (block {expected} is next)")
        elif first > expected:
            faults.append(f"{part.strip()} skips block {expected}")
        if last >= len(blocks):
            faults.append(f"{part.strip()} goes past the last block, {len(blocks) - 1}")
            last = len(blocks) - 1
        expected = max(expected, last + 1)
        chunks.append(tuple(blocks[first : last + 1]))
    if not faults and expected < len(blocks):
        faults.append(f"blocks {expected}-{len(blocks) - 1} are in no group")
    faults += [
        f"{chunk[0]} and {block} are in different stages"
        if kinds[chunk[0]].stage != kinds[block].stage
        else f"{chunk[0]} and {block} have matrices of different shapes"
        for chunk in chunks
        for block in [block for block in chunk if kinds[block] != kinds[chunk[0]]][:1]
    ]
    half, last = len(blocks) // 2, len(blocks) - 1
    hint = f"Name every block once, in order, for example --groups 0-{half - 1},{half}-{last}."
    raise_faults(PlanError, [(f"--groups {text}: {fault}.", hint) for fault in faults])
    return chunks


def _size(
    model: nn.Module, family: Family, groups: Sequence[Group], recipe: PlanRecipe | Plan, store: str
) -> Size:  # fmt: skip
    """Count what sharing takes away and transformations add."""
    params = dict(model.named_parameters())
    each = stored_bytes(model, store)
    teacher_params = sum(p.numel() for p in params.values())
    saved_params = saved_bytes = added_params = added_bytes = 0
    for group in groups:
        for block in group.blocks[1:]:
            for name in group.shared:
                saved_params += params[f"{block}.{name}"].numel()
                saved_bytes += each[f"{block}.{name}"]
        for owner in map(model.get_submodule, group.blocks):
            for transform in recipe.transforms:
                added = family.transforms[transform].num_params(model, owner, recipe.token_kernel)
                added_params += added
                added_bytes += added * (STORES[store].dtype or next(owner.parameters()).dtype).itemsize
    student_params = teacher_params - saved_params + added_params
    teacher_bytes = sum(stored_bytes(model, "source").values())
    student_bytes = sum(each.values()) - saved_bytes + added_bytes
    return Size(
        teacher_params=teacher_params,
        student_params=student_params,
        params_ratio=round(teacher_params / student_params, 4),
        teacher_bytes=teacher_bytes,
        student_bytes=student_bytes,
        bytes_ratio=round(teacher_bytes / student_bytes, 4),
    )
