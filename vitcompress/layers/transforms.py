"""Transformations that blocks with shared matrices do not share; they start as the identity.

    block i:   x ── norm1 ── qkv* ── QKᵀ/√d ── + rpe(Q) ── mix_logits ── softmax ── mix_probs ─┐
               ┌───────────────────────────────────────────────────────────────────────────────┘
               └── ·V ── proj* ── + ── norm2 ── x + token_conv(x) ── fc1* ── GELU ── fc2* ── +

    * shared by the group

Source: weight transformation in MiniViT, arXiv:2204.07154, Sec. 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS_PER_AXIS = 7


class HeadMix(nn.Module):
    """Weight that mixes attention maps across heads, `out[g] = Σ_h weight[g, h] · in[h]`.

    Starts as the identity. Holds the weight only: attentions read it and mix in `mixed_attention`.

    Args:
        num_heads: H.

    Source: MiniViT, Sec. 3.2, transformation for MSA. The released code starts from N(0, 0.02),
        which collapses the attention logits towards zero and loses the pretrained function.
    """

    def __init__(self, num_heads: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(num_heads, device=device, dtype=dtype))

    @staticmethod
    def num_params(num_heads: int) -> int:
        """Return the number of parameters of one mix."""
        return num_heads * num_heads


class TokenConvolution(nn.Module):
    """Add a depthwise k×k convolution over the patch grid: `x + conv(x)`; starts as the identity.

    Class, distillation and register tokens pass unchanged. It has no bias: the norm before it and
    the first MLP layer after it have biases, and each block keeps its own.

    Args:
        dim: C, channels.
        kernel_size: k, in patches; odd.
        grid_size: (rows, columns) of the patch grid.
        num_prefix_tokens: number of tokens before the patches.

    Source: MiniViT, Sec. 3.2, transformation for MLP. The released Mini-Swin adds a norm on the
        residual trunk, so its blocks can never equal the teacher's; Mini-DeiT omits the
        transformation.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        self.weight = nn.Parameter(torch.zeros(dim, 1, kernel_size, kernel_size, device=device, dtype=dtype))

    @staticmethod
    def num_params(dim: int, kernel_size: int) -> int:
        """Return the number of parameters of one convolution."""
        return dim * kernel_size * kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Convolve tokens `[B, N, C]`; returns the same shape."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        rows, cols = fit_grid(patches.shape[1], self.grid_size)
        image = patches.unflatten(1, (rows, cols)).permute(0, 3, 1, 2)  # [B, C, rows, cols], channels last in memory
        # padding="same" gives the same result, but is slower on CPU
        convolved = F.conv2d(image, self.weight, padding=self.weight.shape[-1] // 2, groups=image.shape[1])
        patches = convolved.permute(0, 2, 3, 1).flatten(1, 2).add_(patches)
        return torch.cat([prefix, patches], dim=1) if self.num_prefix_tokens else patches


class KeyPositions(nn.Module):
    """Relative positions for attention logits: `q_i · weight[:, bucket(i − j)]`; starts at zero.

    One table serves all heads: 7×7 buckets of offsets in rows and columns, fine near the query and
    coarse far from it, so that it fits every image size. Class, distillation and register tokens
    have no place on the grid: they get no term, neither as queries nor as keys. If only the class
    token is classified, the last block's term has no effect; it is kept so that every block equals
    the published ones.

    Args:
        head_dim: D, channels of a head.
        grid_size: (rows, columns) of the patch grid.
        num_prefix_tokens: number of tokens before the patches.

    Source: iRPE, Wu et al. 2021, arXiv:2107.14222: contextual, on keys, product method, shared by
        the heads, as in Mini-DeiT. iRPE's DeiT gives the class token a fiftieth bucket; Mini-DeiT
        has no class token.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        grid_size: tuple[int, int],
        num_prefix_tokens: int,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.num_prefix_tokens = num_prefix_tokens
        self.weight = nn.Parameter(torch.zeros(head_dim, BUCKETS_PER_AXIS**2, device=device, dtype=dtype))

    @staticmethod
    def num_params(head_dim: int) -> int:
        """Return the number of parameters of one table."""
        return head_dim * BUCKETS_PER_AXIS**2

    def forward(self, q: Tensor) -> Tensor:
        """Return the term to add to the attention logits, `[B, H, N, N]`.

        Args:
            q: queries `[B, H, N, D]`, scaled as for the logits.
        """
        patches = q[:, :, self.num_prefix_tokens :]
        rows, cols = (offset_buckets(n, q.device) for n in fit_grid(patches.shape[2], self.grid_size))
        # not a buffer: it costs as much as one head of one image, and the grid may change
        buckets = (BUCKETS_PER_AXIS * rows[:, None, :, None] + cols[None, :, None, :]).flatten(2).flatten(0, 1)
        term = (patches @ self.weight).gather(-1, buckets.expand(*patches.shape[:2], -1, -1))
        return F.pad(term, (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))


def offset_buckets(num_positions: int, device: torch.device) -> Tensor:
    """Return the bucket of each offset query − key on one axis, `[num_positions, num_positions]`.

    Offsets up to α have a bucket each, larger ones are binned by their logarithm, and those from γ
    on share the bucket of β: distances of 0, 1, 2 and 3 patches are in buckets 0, 1, 2 and 2, four
    and more in 3, on either side.

    Source: iRPE, Eq. 18, with the released α = 1.9, β = 3.8, γ = 15.2; like the code, rounds before
        cutting at β.
    """
    alpha, beta, gamma = 1.9, 3.8, 15.2
    positions = torch.arange(num_positions, device=device)
    offset = positions[:, None] - positions
    far = offset.abs().clamp(min=1)
    coarse = alpha + (far / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    coarse = coarse.round().clamp(max=beta).long()  # β is cut to 3: seven buckets, not nine
    return torch.where(far <= alpha, offset, offset.sign() * coarse) + BUCKETS_PER_AXIS // 2


def fit_grid(num_patches: int, grid_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of a grid: `grid_size`, or a square for timm's `dynamic_img_size`.

    Raises:
        ValueError: the patches form neither.
    """
    rows, cols = grid_size
    if rows * cols == num_patches:
        return rows, cols
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are neither {rows}×{cols} nor a square grid.")
    return side, side


def mix_tokens(mlp: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook of an MLP with a `token_conv`: convolve its input.

    A hook instead of a wrapper module keeps timm's parameter names, for any type of MLP.
    """
    convolution: TokenConvolution = mlp.token_conv  # type: ignore[assignment]
    return (convolution(inputs[0]), *inputs[1:])


def attach_token_convolution(mlp: nn.Module, convolution: TokenConvolution) -> None:
    """Add a token convolution before the first layer of `mlp`, in place."""
    mlp.token_conv = convolution
    mlp.register_forward_pre_hook(mix_tokens)


TRANSFORM_MODULES = (HeadMix, TokenConvolution, KeyPositions)  # all modules above; they have no weight decay
