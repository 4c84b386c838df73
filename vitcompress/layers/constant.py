"""Stand in for the attention or the MLP of a block that is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A part of a block that adds the same vector to every token.

    It takes whatever arguments the part took, and no norm before it nor scale after it is needed.

    Args:
        dim: C, channels of the stream.
    """

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the vector for each token of `[B, N, C]`."""
        return self.bias.expand_as(x)

    def extra_repr(self) -> str:
        """Describe the layer by its width."""
        return f"dim={len(self.bias)}"
