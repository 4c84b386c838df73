"""Read LayerScale, which multiplies what a part of a block adds to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from vitcompress.initialize.regression import wide

WRITERS = {"attn": "attn.proj", "mlp": "mlp.fc2"}
"""The layer of each part that writes to the stream."""


def layer_scale(block: Any, part: str) -> tuple[Tensor, Tensor]:
    """Return LayerScale after a part, made nonzero, and where it is open, `[C]` each.

    Args:
        block: of the teacher; ones where it is not timm's plain `Block`.
        part: `attn` or `mlp`.
    """
    gamma = torch.ones_like(block.get_submodule(WRITERS[part]).weight[:, 0])
    if type(block) is Block:
        scaling = block.ls1 if part == "attn" else block.ls2
        gamma = getattr(scaling, "gamma", gamma)
    gamma = wide(gamma.detach())
    floor = 1e-3 * gamma.abs().mean()
    is_open = gamma.abs() > floor
    return torch.where(is_open, gamma, torch.where(floor > 0, floor, 1.0)), is_open
