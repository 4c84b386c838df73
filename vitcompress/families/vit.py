"""Plain Vision Transformers: ViT, DeiT (distilled too), DeiT III, DINOv2 with and without registers, CLIP, SigLIP."""

from __future__ import annotations

import re

import torch.nn.functional as F
from timm.layers import Attention, resolve_self_attn_mask
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import (
    TOKEN_CONVOLUTION,
    add_mixes,
    attend_mixed,
    head_mixing,
    key_positions,
    project_qkv,
    take_over,
)
from vitcompress.layers.transforms import KeyPositions


class NarrowAttention(nn.Module):
    """timm's `Attention` with heads of fewer channels: fewer of queries and keys, fewer of values.

    The scale of the logits stays the teacher's: narrow queries and keys give its products, not others.

    Args:
        attn: the attention to take over, its `qkv` and `proj` narrow already; without norms and gate.
    """

    scale: float
    num_heads: int
    attn_drop: nn.Dropout
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        take_over(self, attn)
        self.narrow_heads = True  # taken over with the rest where heads are mixed

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]`; the shape is kept."""
        q, k, v = project_qkv(self, x)
        found = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )  # fmt: skip
        out: Tensor = self.proj_drop(self.proj(found.transpose(1, 2).flatten(2)))
        return out


class MixedAttention(nn.Module):
    """timm's `Attention` with its maps mixed across heads before and after the softmax, after the position term.

    Takes over the modules of `attn`, so their names stay. Both need the maps themselves, so fused attention is given
    up here, and only here.

    Args:
        attn: the attention to take over.
        mix_heads: whether the maps are mixed.
    """

    scale: float
    mix_logits: nn.Module
    mix_probs: nn.Module
    rpe: KeyPositions | None
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None  # in a few gated models
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: Attention | NarrowAttention, *, mix_heads: bool = True) -> None:
        super().__init__()
        take_over(self, attn)
        add_mixes(self, mix_heads=mix_heads)
        self.rpe = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]`; the shape is kept."""
        tokens = x.shape[1]
        q, k, v = project_qkv(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if self.rpe is None else self.rpe(q * self.scale)
        mask = resolve_self_attn_mask(tokens, q, attn_mask, is_causal)
        found = self.norm(attend_mixed(self, q, k, v, scale=self.scale, bias=bias, mask=mask))
        if self.gate is not None:
            found = found * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(found))
        return out


VIT = Family(
    name="vit",
    model_type=VisionTransformer,
    block=re.compile(r"blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|gate|proj)|mlp\.fc\d(_[gx])?)\.weight"),
    biases=re.compile(r"(attn\.(qkv|gate|proj)|mlp\.fc\d(_[gx])?)\.bias"),
    transforms={
        "heads": head_mixing({Attention: MixedAttention, NarrowAttention: MixedAttention}),
        "mlp": TOKEN_CONVOLUTION,
        "rpe": key_positions(Attention, MixedAttention),
    },
    convert=checkpoint_filter_fn,
    narrow_attention=NarrowAttention,
)

__all__ = ["VIT", "MixedAttention", "NarrowAttention"]
