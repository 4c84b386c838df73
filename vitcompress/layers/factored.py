"""A linear layer whose matrix is the product of two factors, or a full matrix plus this product.

    W_i  =  base  +  up · down        base  [out, in]  shared by the group; else W_i has rank r
                                      up    [out, r]   the block's own, or shared by the group
                                      down  [r, in]    the block's own, or shared by the group

With a shared basis, the group shares the factor on the side of the residual stream: `down` if the
layer reads the stream (qkv, fc1: W_i = U_i S), `up` if it writes to it (proj, fc2: W_i = S U_i).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactoredLinear(nn.Linear):
    """A linear layer whose matrix is `base + up @ down`.

    It is an `nn.Linear`: `weight` computes the full matrix when read, for attentions that pass it
    to `F.linear`. The forward pass applies the factors one after the other, which is less work.

    Args:
        linear: the layer to replace; must not be used afterwards. Its bias is kept, its matrix only
            with `whole`.
        rank: r, at least 1.
        whole: keep the matrix as `base`.

    Source: low-rank residuals, Hu et al. 2021, arXiv:2106.09685, Sec. 4.1, here on shared weights.
        Shared bases are ours.
    """

    holds_matrices = True  # tells the quantizer that its parameters are matrices

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
        """r, number of columns of `up` and of rows of `down`."""
        return len(self.down)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The full matrix, `[out, in]`."""
        product = self.up @ self.down
        return product if self.base is None else self.base + product

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if self.base is None:
            return F.linear(F.linear(x, self.down), self.up, self.bias)
        return F.linear(x, self.base, self.bias) + F.linear(F.linear(x, self.down), self.up)

    def extra_repr(self) -> str:
        """Describe the layer like `nn.Linear`, with its rank."""
        return f"{super().extra_repr()}, rank={self.rank}, whole={self.base is not None}"
