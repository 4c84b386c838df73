"""Are these the same weights?  A SHA-256 over names, types, shapes and bytes of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Digest:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order in which they come."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def begin(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> None:
        """Say which tensor the next bytes are of."""
        self._digest.update(f"{name}:{dtype}:{tuple(shape)};".encode())

    def add(self, part: memoryview) -> None:
        """Take in bytes."""
        self._digest.update(part)

    def add_tensor(self, t: Tensor) -> None:
        """Take in all bytes of a tensor on CPU, without a copy where it is contiguous."""
        self.add(t.contiguous().flatten().view(torch.uint8).numpy().data)

    def hex(self) -> str:
        """The digest of all that came, 64 digits."""
        return self._digest.hexdigest()


def sha256_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in order of names."""
    digest = Digest()
    for name in sorted(weights):
        t = weights[name].detach().cpu()
        digest.begin(name, t.dtype, t.shape)
        digest.add_tensor(t)
    return digest.hex()
