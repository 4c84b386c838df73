"""What stands in a block where a linear layer was, when its matrix is a sum of a whole one and factors?

    W_i  =  base  +  up · down        base     [out, in]   one of the group, or none: then the layer has low rank
                                      up       [out, r]    the block's own, or one of the group
                                      down     [r, in]     the block's own, or one of the group

Of a shared basis the factor on the side of the residual stream is the group's: `down` where a layer reads the stream
(qkv, fc1: W_i = U_i S), `up` where it writes to it (proj, fc2: W_i = S U_i).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactoredLinear(nn.Linear):
    """A linear layer whose matrix is `base + up @ down`.

    An `nn.Linear` to all who look at one: `weight` is the whole matrix, made when asked for, for the attentions that
    hand it to `F.linear`. Called as a module, the factors are applied one after the other, which is less work.

    Args:
        linear: the layer to take over; its bias stays, and its matrix too where `whole`. Of no use afterwards.
        rank: r, at least 1.
        whole: keep the matrix as `base`.

    Source: low-rank residuals, Hu et al. 2021, arXiv:2106.09685, Sec. 4.1, here of shared weights. Shared bases are
        ours.
    """

    holds_matrices = True  # for those who quantise

    def __init__(self, linear: nn.Linear, rank: int, *, whole: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        like = linear.weight
        self.bias = linear.bias
        self.base = linear.weight if whole else None
        self.up = nn.Parameter(torch.zeros(self.out_features, rank, device=like.device, dtype=like.dtype))
        self.down = nn.Parameter(torch.zeros(rank, self.in_features, device=like.device, dtype=like.dtype))

    @property
    def rank(self) -> int:
        """r, columns of `up` and rows of `down`."""
        return len(self.down)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole matrix, `[out, in]`."""
        product = self.up @ self.down
        return product if self.base is None else self.base + product

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if self.base is None:
            return F.linear(F.linear(x, self.down), self.up, self.bias)
        return F.linear(x, self.base, self.bias) + F.linear(F.linear(x, self.down), self.up)

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the rank."""
        return f"{super().extra_repr()}, rank={self.rank}, whole={self.base is not None}"
