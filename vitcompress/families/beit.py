"""Family of BEiT and BEiT v2.

Their relative position bias is per block or shared by all, and only q and v have biases.
"""

from __future__ import annotations

import re

from timm.models.beit import Attention, Beit, checkpoint_filter_fn
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


class MixedBeitAttention(Attention):  # type: ignore[misc]
    """timm's `Attention` of BEiT with head mixing, after the position bias.

    Args:
        attn: timm's attention, which is taken over.
    """

    def __init__(self, attn: Attention) -> None:
        take_over(self, attn)
        add_mixes(self)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend over tokens `[B, N, C]` and return the same shape.

        Args:
            x: the tokens.
            shared_rel_pos_bias: position bias of the model, `[H, N, N]`, added to the block's own.
        """
        q, k, v = project_qkv(self, x)
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        out: Tensor = self.proj_drop(self.proj(attend_mixed(self, q, k, v, scale=self.scale, bias=bias)))
        return out


BEIT = Family(
    name="beit",
    model_type=Beit,
    block=re.compile(r"blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d(_[gx])?)\.weight"),
    biases=re.compile(r"attn\.[qv]_bias|(attn\.proj|mlp\.fc\d(_[gx])?)\.bias"),
    tables=re.compile(r"attn\.relative_position_bias_table"),
    transforms={
        "heads": head_mixing({Attention: MixedBeitAttention}),
        "mlp": TOKEN_CONVOLUTION,
        "rpe": never("BEiT has a relative position bias of its own"),
    },
    convert=checkpoint_filter_fn,
)
