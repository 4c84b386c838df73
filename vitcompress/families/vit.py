"""Plain Vision Transformers: ViT, DeiT (distilled too), DeiT III, DINOv2 with and without registers, CLIP, SigLIP."""

from __future__ import annotations

import re

from timm.layers import Attention, resolve_self_attn_mask
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import (
    TOKEN_CONVOLUTION,
    attend_mixed,
    head_mixing,
    key_positions,
    project_qkv,
    take_over,
)
from vitcompress.transforms import KeyPositions


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

    def __init__(self, attn: Attention, *, mix_heads: bool = True) -> None:
        super().__init__()
        take_over(self, attn, mix_heads=mix_heads)
        self.rpe = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]`; the shape is kept."""
        tokens = x.shape[1]
        q, k, v = project_qkv(self, x)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        logits = q @ k.transpose(-2, -1)
        if self.rpe is not None:
            logits = logits + self.rpe(q)
        mask = resolve_self_attn_mask(tokens, logits, attn_mask, is_causal)
        found = self.norm(attend_mixed(self, logits, v, mask))
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
        "heads": head_mixing({Attention: MixedAttention}),
        "mlp": TOKEN_CONVOLUTION,
        "rpe": key_positions(Attention, MixedAttention),
    },
    convert=checkpoint_filter_fn,
)

__all__ = ["VIT", "MixedAttention"]
