"""Family of Swin Transformers and S3: windows, a shift in every second block, four stages."""

from __future__ import annotations

import re

from timm.models.swin_transformer import SwinTransformer, WindowAttention, checkpoint_filter_fn
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


class MixedWindowAttention(WindowAttention):  # type: ignore[misc]
    """timm's `WindowAttention` of Swin with head mixing between position bias and mask.

    Mixing needs the attention maps, so blocks with it cannot use fused attention.

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
        mask = mask_per_window(mask, x.shape[0])
        heads = attend_mixed(self, q, k, v, scale=self.scale, bias=self._get_rel_pos_bias(), mask=mask)
        out: Tensor = self.proj_drop(self.proj(heads))
        return out


def mask_per_window(mask: Tensor | None, num_windows: int) -> Tensor | None:
    """Repeat the shift mask of one image's windows for a batch.

    Args:
        mask: `[windows, N, N]`; None if the block does not shift.
        num_windows: number of windows in the batch, a multiple of `windows`.

    Returns:
        `[num_windows, 1, N, N]`; None if `mask` is None.
    """
    return None if mask is None else mask.repeat(num_windows // mask.shape[0], 1, 1).unsqueeze(1)


SWIN = Family(
    name="swin",
    model_type=SwinTransformer,
    block=re.compile(r"layers\.(\d+)\.blocks\.\d+"),
    weights=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d)\.weight"),
    biases=re.compile(r"(attn\.(qkv|proj)|mlp\.fc\d)\.bias"),
    tables=re.compile(r"attn\.relative_position_bias_table"),
    transforms={
        "heads": head_mixing({WindowAttention: MixedWindowAttention}),
        "mlp": GRID_CONVOLUTION,
        "rpe": never("its windows have a relative position bias of their own"),
    },
    convert=checkpoint_filter_fn,
)
