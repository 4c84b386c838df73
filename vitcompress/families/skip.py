"""Leave out the attention or the MLP of a block; a constant takes its place.

x ── norm ── attn or mlp ── scale ── + ──        becomes        x ── constant ── + ──
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

from vitcompress.families.narrow import is_plain_attention, is_plain_mlp
from vitcompress.layers.constant import Constant

_BESIDE = {"attn": ("norm1", "ls1"), "mlp": ("norm2", "ls2")}


def skippable(block: Any) -> tuple[str, ...]:
    """Return the parts of a block that can be left out: of timm's plain blocks, plain parts."""
    if type(block) is not Block:
        return ()
    plain = {"attn": is_plain_attention, "mlp": is_plain_mlp}
    return tuple(part for part, is_plain in plain.items() if is_plain(getattr(block, part)))


def skipped_names(block: nn.Module, skipped: tuple[str, ...]) -> set[str]:
    """Return the names of the parameters that go with parts of a block.

    Args:
        block: a block of the source.
        skipped: parts that are left out.
    """
    return {
        name for part in skipped for name, _ in block.named_parameters() if name.split(".")[0] in (part, *_BESIDE[part])
    }


def skip_parts(block: Any, skipped: tuple[str, ...]) -> None:
    """Replace parts of a block by constants, zero at first, in place.

    Args:
        block: a block of a timm model, on any device, including meta.
        skipped: parts that `skippable` returns.
    """
    for part in skipped:
        writer = block.attn.proj if part == "attn" else block.mlp.fc2
        weight = writer.weight
        setattr(block, part, Constant(writer.out_features, device=weight.device, dtype=weight.dtype))
        for name in _BESIDE[part]:
            setattr(block, name, nn.Identity())
