"""Read the .npz files in which Google publishes ViT, under timm's names and in torch's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# applied in this order to every name
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(opt/target|params/img|params)/", ""),
        (r"/", "."),
        (r"^embedding\.", "patch_embed.proj."),
        (r"^cls$", "cls_token"),
        (r"^(Transformer\.posembed_input\.)?pos_embedding$", "pos_embed"),
        (r"^Transformer\.encoder_norm\.", "norm."),
        (r"^Transformer\.encoderblock_(\d+)\.", r"blocks.\1."),
        (r"\.LayerNorm_0\.", ".norm1."),
        (r"\.LayerNorm_[12]\.", ".norm2."),  # counted with or without the attention between them
        (r"\.MlpBlock_\d\.Dense_0\.", ".mlp.fc1."),
        (r"\.MlpBlock_\d\.Dense_1\.", ".mlp.fc2."),
        (r"\.MultiHeadDotProductAttention_\d\.out\.", ".attn.proj."),
        (r"\.MultiHeadDotProductAttention_\d\.", ".attn."),
        (r"\.scale$", ".weight"),
        (r"\.kernel$", ".weight"),
    )
)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a file as tensors; names that are not ViT's keep their words.

    Args:
        path: a file that `numpy.savez` wrote.

    Raises:
        ValueError: an array is no table of numbers, or two get one name.
    """
    tensors: dict[str, Tensor] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            new = _rename(name)
            if new in tensors:
                raise ValueError(f"two of its arrays have the name {new} in timm, one of them is {name}")
            tensors[new] = _laid_out(new, torch.from_numpy(np.atleast_1d(arrays[name])))
    return _fuse_qkv(tensors)


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def _laid_out(name: str, t: Tensor) -> Tensor:
    """Return a matrix with its outputs first, and heads side by side."""
    if re.search(r"\.attn\.(query|key|value)\.", name):  # [in, heads, width], or [heads, width]
        return t.flatten(1).T.contiguous() if name.endswith("weight") else t.flatten()
    if not name.endswith("weight"):
        return t
    if name.endswith("attn.proj.weight") and t.ndim == 3:  # [heads, width, out]
        return t.flatten(0, 1).T.contiguous()
    if t.ndim == 4:  # [rows, columns, in, out]
        return t.permute(3, 2, 0, 1).contiguous()
    return t.T.contiguous() if t.ndim == 2 else t


def _fuse_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate queries, keys and values of each block, where it has all of them."""
    fused = dict(tensors)
    for name in tensors:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if ".attn.query." in name and all(part in tensors for part in parts):
            fused[name.replace(".query.", ".qkv.")] = torch.cat([fused.pop(part) for part in parts])
    return fused
