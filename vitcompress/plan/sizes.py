"""How many parameters and bytes has the student?  Arithmetic on the teacher's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import nn

from vitcompress.factored import FactoredLinear
from vitcompress.families import Family, narrowed_shapes
from vitcompress.plan.model import Group, Size


def size_of(
    model: nn.Module, family: Family, groups: Sequence[Group], transforms: Sequence[str], token_kernel: int
) -> Size:
    """Count what is left and what is added.

    Args:
        model: the teacher, nothing shared in it yet; meta will do.
        family: of the model.
        groups: every block of the model, each in one.
        transforms: of every block.
        token_kernel: of the token convolution.
    """
    teacher_params = sum(p.numel() for p in model.parameters())
    teacher_bytes = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
    student_params, student_bytes = teacher_params, teacher_bytes
    for group in groups:
        for position, name in enumerate(group.blocks):
            block: Any = model.get_submodule(name)
            itemsize = next(block.parameters()).element_size()
            for p in block.parameters():
                student_params -= p.numel()
                student_bytes -= p.numel() * p.element_size()
            for count, size in _kept(family, block, group, donor=position == 0):
                student_params += count
                student_bytes += count * size
            for transform in transforms:
                added = family.transforms[transform].num_params(model, block, token_kernel)
                student_params += added
                student_bytes += added * itemsize
    return Size(
        teacher_params=teacher_params,
        student_params=student_params,
        params_ratio=round(teacher_params / student_params, 4),
        teacher_bytes=teacher_bytes,
        student_bytes=student_bytes,
        bytes_ratio=round(teacher_bytes / student_bytes, 4),
    )


def group_params(model: nn.Module, family: Family, group: Group) -> int:
    """Parameters that the blocks of `group` store, without transformations.

    Args:
        model: the teacher; meta will do.
        family: of the model.
        group: of its blocks.
    """
    return sum(
        count
        for position, name in enumerate(group.blocks)
        for count, _ in _kept(family, model.get_submodule(name), group, donor=position == 0)
    )


def _kept(family: Family, block: Any, group: Group, *, donor: bool) -> Iterator[tuple[int, int]]:
    """What a block of `group` stores of its own, as (parameters, bytes each); the donor stores what is shared too."""
    shapes = narrowed_shapes(block, group.widths)
    for name, p in block.named_parameters():
        layer, _, leaf = name.rpartition(".")
        shape = tuple(p.shape)
        if layer in shapes:
            shape = shapes[layer] if leaf == "weight" else shapes[layer][:1]
        if leaf == "weight" and layer in group.ranks:
            up, down = FactoredLinear.num_params((shape[0], shape[1]), group.ranks[layer])
            basis, own = (up, down) if family.writes.fullmatch(layer) else (down, up)
            yield own, p.element_size()
            if donor or layer not in group.bases:
                yield basis, p.element_size()
        if (leaf != "weight" or group.whole(layer)) and (donor or name not in group.shared):
            yield prod(shape), p.element_size()
