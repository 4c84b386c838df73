"""EVA, EVA-02 and what timm builds on them: DINOv3, Perception Encoders, ViTs with rotary positions."""

from __future__ import annotations

import re

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat, resolve_self_attn_mask
from timm.models.eva import Eva, EvaAttention, checkpoint_filter_fn
from torch import Tensor, nn

from vitcompress.families.base import Family
from vitcompress.families.insertion import (
    TOKEN_CONVOLUTION,
    add_mixes,
    attend_mixed,
    head_mixing,
    never,
    project_qkv,
    take_over,
)


class MixedRopeAttention(nn.Module):
    """timm's `EvaAttention` or `AttentionRope` with its maps mixed across heads before and after the softmax.

    Takes over what `attn` holds, so names stay. The two differ in where their biases are, and in that the second may
    have fewer heads of keys and values than of queries.

    Args:
        attn: the attention to take over.
    """

    head_dim: int
    scale: float
    num_prefix_tokens: int
    rotate_half: bool
    qkv: nn.Linear | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attn: EvaAttention | AttentionRope) -> None:
        super().__init__()
        take_over(self, attn)
        add_mixes(self)
        self.num_kv_groups: int = getattr(attn, "num_kv_groups", 1)

    # timm's own: they use nothing but what was taken over
    _init_buffers = EvaAttention._init_buffers

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that no file holds; `EvaAttention` alone has one."""
        if "k_bias" in self._buffers:
            self._init_buffers()

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend over tokens `[B, N, C]`, `rope` `[N − prefix, 2·D]` turning the patches'; the shape is kept."""
        if self.qkv is not None:
            q, k, v = project_qkv(self, x)
        else:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        if self.num_kv_groups > 1:
            k, v = k.repeat_interleave(self.num_kv_groups, dim=1), v.repeat_interleave(self.num_kv_groups, dim=1)
        mask = resolve_self_attn_mask(x.shape[1], q, attn_mask, is_causal)
        found = self.norm(attend_mixed(self, q, k, v, scale=self.scale, mask=mask))
        if self.gate is not None:
            found = found * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(found))
        return out

    def _rotate(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Turn the patches' queries or keys `[B, H, N, D]` by their positions; prefix tokens have none."""
        prefix, patches = heads[:, :, : self.num_prefix_tokens], heads[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2)


EVA = Family(
    name="eva",
    model_type=Eva,
    block=re.compile(r"blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|[qkv]_proj|gate|proj)|mlp\.fc\d(_[gx])?)\.weight"),
    biases=re.compile(r"attn\.[qv]_bias|(attn\.(qkv|[qkv]_proj|gate|proj)|mlp\.fc\d(_[gx])?)\.bias"),
    transforms={
        "heads": head_mixing({EvaAttention: MixedRopeAttention, AttentionRope: MixedRopeAttention}),
        "mlp": TOKEN_CONVOLUTION,
        "rpe": never("it is for plain ViTs; where the EVA family has relative positions, they are rotary"),
    },
    convert=checkpoint_filter_fn,
)

__all__ = ["EVA", "MixedRopeAttention"]
