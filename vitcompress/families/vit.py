"""Family of plain Vision Transformers.

ViT, DeiT (also distilled), DeiT III, DINOv2 with and without registers, CLIP and SigLIP.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from timm.layers import Attention, resolve_self_attn_mask
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

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

MAX_MAP_ELEMENTS = 1 << 18
"""Attention maps up to that size stay in a core's cache."""


def pad_alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of queries and values with zeros, which change neither maps nor values.

    Fused attention needs one width; without it, the CPU takes up to four times as long.

    Args:
        q: queries `[B, H, N, D]`.
        k: keys `[B, H, N, D]`.
        v: values `[B, H, N, V]`.
    """
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        return F.pad(q, (0, missing)), F.pad(k, (0, missing)), v
    return q, k, F.pad(v, (0, -missing)) if missing else v


def favors_plain_products(q: Tensor, v: Tensor) -> bool:
    """Whether attention without padding and fusion is faster: on a CPU, where its maps are small.

    For one image of DeiT-Tiny it takes 0.8 to 0.9 of the time.

    Args:
        q: queries `[B, H, N, D]`.
        v: values `[B, H, N, V]`.
    """
    batch, heads, tokens, width = q.shape
    is_small = batch * heads * tokens**2 <= MAX_MAP_ELEMENTS
    return is_small and width != v.shape[-1] and q.device.type == "cpu" and q.dtype == torch.float32


class NarrowAttention(Attention):  # type: ignore[misc]
    """timm's `Attention` with fewer channels per head.

    Queries and keys have one width, values another. The scale of the logits stays the source's,
    because narrow queries and keys approximate the source's products.

    Args:
        attn: timm's attention, which is taken over; `qkv` and `proj` are narrow already, and it has
            neither norms nor a gate.
    """

    def __init__(self, attn: Attention) -> None:
        take_over(self, attn)
        self.narrow_heads = True  # `MixedAttention` takes it over

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]` and return the same shape; the masks are as in timm."""
        q, k, v = project_qkv(self, x)
        is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
        if is_eager and not (self.training or is_causal) and attn_mask is None and favors_plain_products(q, v):
            heads = (q * self.scale @ k.mT).softmax(-1) @ v
        else:
            width = v.shape[-1]
            q, k, v = pad_alike(q, k, v) if is_eager else (q, k, v)
            heads = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=self.scale,
                dropout_p=self.attn_drop.p if self.training else 0.0,
            )[..., :width]  # fmt: skip
        out: Tensor = self.proj_drop(self.proj(heads.transpose(1, 2).flatten(2)))
        return out


class MixedAttention(Attention):  # type: ignore[misc]
    """timm's `Attention` with head mixing and, if set, the position term `rpe`.

    Head mixing and `rpe` need the attention maps, so blocks with either cannot use fused attention.

    Args:
        attn: timm's attention or a narrow one, which is taken over.
        mix_heads: whether to mix heads.
    """

    def __init__(self, attn: Attention | NarrowAttention, *, mix_heads: bool = True) -> None:
        take_over(self, attn)
        add_mixes(self, mix_heads=mix_heads)
        self.rpe: KeyPositions | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens `[B, N, C]` and return the same shape; the masks are as in timm."""
        q, k, v = project_qkv(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if self.rpe is None else self.rpe(q * self.scale)
        mask = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        heads = self.norm(attend_mixed(self, q, k, v, scale=self.scale, bias=bias, mask=mask))
        if self.gate is not None:
            heads = heads * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(heads))
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
    any_view_size=True,
)
