"""Compute the student's parameters and bytes from the source's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.narrow import narrowed_shapes
from vitcompress.families.skip import skipped_names
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
    """Compute the parameters and bytes of a source and its student.

    Args:
        model: the source, without sharing, on any device, including meta.
        family: family of the model.
        groups: groups that together hold every block once.
        transforms: transformations of every block.
        token_kernel: kernel size of the token convolution, in patches.
        store: number format of the student's file, a key of `STORES`.
    """
    teacher_params = sum(p.numel() for p in model.parameters())
    teacher_bytes = sum(stored_bytes(model, "source").values())
    bytes_by_name = stored_bytes(model, store)
    matrices = matrix_names(model)
    student_params, student_bytes = teacher_params, sum(bytes_by_name.values())
    for group in groups:
        for position, name in enumerate(group.blocks):
            block: Any = model.get_submodule(name)
            for leaf, p in block.named_parameters():
                student_params -= p.numel()
                student_bytes -= bytes_by_name[f"{name}.{leaf}"]
            for leaf, t, is_factor in _stored_tensors(family, block, group, is_donor=position == 0):
                student_params += t.numel()
                matrix = (is_factor or f"{name}.{leaf}" in matrices) and is_matrix(t)
                student_bytes += bytes_of(tuple(t.shape), t.dtype, store, matrix=matrix, learned=True)
            for transform in group.transforms(transforms):
                added_params = family.transforms[transform].num_params(model, block, token_kernel)
                student_params += added_params
                student_bytes += added_params * (STORES[store].dtype or next(block.parameters()).dtype).itemsize
    return Size(
        teacher_params=teacher_params,
        student_params=student_params,
        params_ratio=round(teacher_params / student_params, 4),
        teacher_bytes=teacher_bytes,
        student_bytes=student_bytes,
        bytes_ratio=round(teacher_bytes / student_bytes, 4),
    )


def group_params(model: nn.Module, family: Family, group: Group) -> int:
    """Count the parameters that the blocks of `group` store, without transformations.

    Args:
        model: the source, on any device, including meta.
        family: family of the model.
        group: blocks of the model.
    """
    return sum(
        t.numel()
        for position, name in enumerate(group.blocks)
        for _, t, _ in _stored_tensors(family, model.get_submodule(name), group, is_donor=position == 0)
    )


def _stored_tensors(family: Family, block: Any, group: Group, *, is_donor: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, meta tensor and whether it is a factor, for all that a block of `group` stores.

    Names are the source's. The donor also stores what the group shares. Transformations are not
    included.
    """
    shapes, skipped = narrowed_shapes(block, group.widths), skipped_names(block, group.skipped)
    for part in group.skipped:
        p = block.get_parameter("attn.proj.bias" if part == "attn" else "mlp.fc2.bias")
        yield f"{part}.bias", torch.empty(tuple(p.shape), device="meta", dtype=p.dtype), False
    for name, p in block.named_parameters():
        if name in skipped:
            continue
        layer, _, leaf = name.rpartition(".")
        shape = tuple(p.shape)
        if layer in shapes:
            shape = shapes[layer] if leaf == "weight" else shapes[layer][:1]
        if leaf == "weight" and layer in group.ranks:
            rank = group.ranks[layer]
            up = torch.empty(shape[0], rank, device="meta", dtype=p.dtype)
            down = torch.empty(rank, shape[1], device="meta", dtype=p.dtype)
            basis, block_factor = (up, down) if family.writes.fullmatch(layer) else (down, up)
            yield name, block_factor, True
            if is_donor or layer not in group.bases:
                yield name, basis, True
        if (leaf != "weight" or group.whole(layer)) and (is_donor or name not in group.shared):
            yield name, torch.empty(shape, device="meta", dtype=p.dtype), False
