"""How many parameters and bytes has the student?  Arithmetic on the teacher's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import narrowed_shapes
from vitcompress.plans.model import Group, Size
from vitcompress.quantize.codecs import STORES, bytes_of, is_matrix, matrix_names, stored_bytes


def size_of(
    model: nn.Module,
    family: Family,
    groups: Sequence[Group],
    transforms: Sequence[str],
    token_kernel: int,
    store: str = "source",
) -> Size:
    """Count what is left and what is added.

    Args:
        model: the teacher, nothing shared in it yet; meta will do.
        family: of the model.
        groups: every block of the model, each in one.
        transforms: of every block.
        token_kernel: of the token convolution.
        store: how the file holds the student, a key of `STORES`.
    """
    teacher_params = sum(p.numel() for p in model.parameters())
    teacher_bytes = sum(stored_bytes(model, "source").values())
    each = stored_bytes(model, store)
    matrices = matrix_names(model)
    student_params, student_bytes = teacher_params, sum(each.values())
    for group in groups:
        for position, name in enumerate(group.blocks):
            block: Any = model.get_submodule(name)
            for leaf, p in block.named_parameters():
                student_params -= p.numel()
                student_bytes -= each[f"{name}.{leaf}"]
            for leaf, t, is_factor in _kept(family, block, group, donor=position == 0):
                student_params += t.numel()
                matrix = is_factor or f"{name}.{leaf}" in matrices
                student_bytes += _bytes_of(t, store, matrix=matrix)
            for transform in transforms:
                added = family.transforms[transform].num_params(model, block, token_kernel)
                student_params += added
                student_bytes += added * (STORES[store].dtype or next(block.parameters()).dtype).itemsize
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
        t.numel()
        for position, name in enumerate(group.blocks)
        for _, t, _ in _kept(family, model.get_submodule(name), group, donor=position == 0)
    )


def _bytes_of(t: Tensor, store: str, *, matrix: bool) -> int:
    """Bytes of a parameter in a file, with its scales."""
    return bytes_of(tuple(t.shape), t.dtype, store, matrix=matrix and is_matrix(t), learned=True)


def _kept(family: Family, block: Any, group: Group, *, donor: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """What a block of `group` stores of its own: the teacher's name, a tensor like it on meta, and whether a factor.

    The donor stores what is shared too.
    """
    shapes = narrowed_shapes(block, group.widths)
    for name, p in block.named_parameters():
        layer, _, leaf = name.rpartition(".")
        shape = tuple(p.shape)
        if layer in shapes:
            shape = shapes[layer] if leaf == "weight" else shapes[layer][:1]
        if leaf == "weight" and layer in group.ranks:
            rank = group.ranks[layer]
            up, down = (torch.empty(s, device="meta", dtype=p.dtype) for s in ((shape[0], rank), (rank, shape[1])))
            basis, own = (up, down) if family.writes.fullmatch(layer) else (down, up)
            yield name, own, True
            if donor or layer not in group.bases:
                yield name, basis, True
        if (leaf != "weight" or group.whole(layer)) and (donor or name not in group.shared):
            yield name, torch.empty(shape, device="meta", dtype=p.dtype), False
