"""Family of timm's `Eva`.

EVA, EVA-02, DINOv3, Perception Encoders and ViTs with rotary positions.
"""

from __future__ import annotations

import re

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat, resolve_self_attn_mask
from timm.models.eva import Eva, EvaAttention, checkpoint_filter_fn
from torch import Tensor

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


class MixedRopeAttention(EvaAttention):  # type: ignore[misc]
    """timm's `EvaAttention` or `AttentionRope` with head mixing before and after the softmax.

    The two types keep their biases in different places, and `AttentionRope` may have fewer heads of
    keys and values than of queries.

    Args:
        attn: timm's attention, which is taken over.
    """

    def __init__(self, attn: EvaAttention | AttentionRope) -> None:
        take_over(self, attn)
        add_mixes(self)
        self.num_kv_groups = getattr(attn, "num_kv_groups", 1)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not in the state dict; only `EvaAttention` has one."""
        if "k_bias" in self._buffers:
            self._init_buffers()

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend over tokens `[B, N, C]` and return the same shape; the masks are as in timm.

        `rope` is the rotary embedding of the patches, `[N − prefix, 2·D]`.
        """
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
        heads = self.norm(attend_mixed(self, q, k, v, scale=self.scale, mask=mask))
        if self.gate is not None:
            heads = heads * self.gate(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(heads))
        return out

    def _rotate(self, heads: Tensor, rope: Tensor) -> Tensor:
        """Rotate the queries or keys `[B, H, N, D]` of patches; prefix tokens have no position."""
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
        "rpe": never("it is for plain ViTs; the relative positions of the EVA family are rotary"),
    },
    convert=checkpoint_filter_fn,
    any_view_size=True,
)
