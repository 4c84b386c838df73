"""Compute SHA-256 digests of tensors: names, types, shapes and bytes.

Types are text, as torch prints them ("torch.float32"), so that a file can be checked without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Digest:
    """SHA-256 of tensors, in the order in which they are added."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        """Start a tensor; its bytes follow.

        Args:
            name: name of the tensor.
            dtype: type as torch prints it, such as "torch.float32".
            shape: shape of the tensor.
        """
        self._digest.update(f"{name}:{dtype}:{tuple(shape)};".encode())

    def add(self, part: memoryview) -> None:
        """Add bytes of the current tensor."""
        self._digest.update(part)

    def hex(self) -> str:
        """Return the digest of everything added so far, as 64 hex digits."""
        return self._digest.hexdigest()


def sha256_of(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict, its tensors sorted by name."""
    digest = Digest()
    for name in sorted(weights):
        t = weights[name].detach().cpu()
        digest.begin(name, str(t.dtype), t.shape)
        digest.add(memory_of(t.contiguous()))
    return digest.hex()


def memory_of(t: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on CPU; writing to them changes the tensor."""
    import torch  # only here, because reading a manifest needs no torch

    return t.flatten().view(torch.uint8).numpy().data
