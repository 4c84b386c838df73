"""Family of Swin Transformers V2: cosine attention, position bias from an MLP, post-norm."""

from __future__ import annotations

import math
import re

import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2, WindowAttention, checkpoint_filter_fn
from torch import Tensor

from vitcompress.families.base import Family
from vitcompress.families.insertion import (
    GRID_CONVOLUTION,
    add_mixes,
    attend_mixed,
    head_mixing,
    never,
    project_qkv,
    take_over,
)
from vitcompress.families.swin import mask_per_window

_MAX_LOGIT_SCALE = math.log(1 / 0.01)


class MixedWindowAttentionV2(WindowAttention):  # type: ignore[misc]
    """timm's `WindowAttention` of Swin V2 with head mixing between position bias and mask.

    Args:
        attn: timm's attention, which is taken over.
    """

    def __init__(self, attn: WindowAttention) -> None:
        take_over(self, attn)
        add_mixes(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside windows `[B·windows, N, C]` and return the same shape.

        Args:
            x: tokens of the windows.
            mask: mask of shifted windows, `[windows, N, N]`; None if the block does not shift.
        """
        q, k, v = project_qkv(self, x)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        mask = mask_per_window(mask, x.shape[0])
        heads = attend_mixed(self, q, F.normalize(k, dim=-1), v, bias=self._bias(), mask=mask)
        out: Tensor = self.proj_drop(self.proj(heads))
        return out

    def _bias(self) -> Tensor:
        """Compute the position bias `[H, N, N]` with the MLP `cpb_mlp`."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias: Tensor = table[self.relative_position_index].permute(2, 0, 1)
        return 16 * bias.sigmoid()


SWIN_V2 = Family(
    name="swin_v2",
    model_type=SwinTransformerV2,
    block=re.compile(r"layers\.(\d+)\.blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d)\.weight"),
    biases=re.compile(r"attn\.[qv]_bias|(attn\.proj|mlp\.fc\d)\.bias"),
    tables=re.compile(r"attn\.cpb_mlp\.\d\.(weight|bias)"),
    transforms={
        "heads": head_mixing({WindowAttention: MixedWindowAttentionV2}),
        "mlp": GRID_CONVOLUTION,
        "rpe": never("its windows have a relative position bias of their own"),
    },
    convert=checkpoint_filter_fn,
)
