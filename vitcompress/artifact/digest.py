"""Compute SHA-256 digests of tensors: names, types, shapes and bytes.

Types are text, as torch prints them ("torch.float32"), so that a file can be checked without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sha256_of(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict, its tensors sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        t = weights[name].detach().cpu()
        digest.update(tensor_label(name, str(t.dtype), t.shape))
        digest.update(memory_of(t.contiguous()))
    return digest.hexdigest()


def tensor_label(name: str, dtype: str, shape: Iterable[int]) -> bytes:
    """Return what a digest covers before the bytes of a tensor.

    Args:
        name: name of the tensor.
        dtype: type as torch prints it, such as "torch.float32".
        shape: shape of the tensor.
    """
    return f"{name}:{dtype}:{tuple(shape)};".encode()


def memory_of(t: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on CPU; writing to them changes the tensor."""
    import torch  # only here, because reading a manifest needs no torch

    return t.flatten().view(torch.uint8).numpy().data
