"""Make blocks narrower: fewer hidden neurons in the MLP, fewer channels in the attention heads.

    MLP      fc1 [hidden, C]              fc2 [C, hidden]     hidden ≤ the source's
    heads    q, k [H·qk, C], v [H·v, C]   proj [C, H·v]       qk, v ≤ the source's

Queries only meet keys, and values only meet the projection, so each pair can have its own width.
The scale of the logits stays the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from vitcompress.families.widths import Widths


def full_widths(block: Any, narrow_attention: Callable[[Any], nn.Module] | None) -> Widths:
    """Return the widths of `block`, None for each that cannot be changed.

    Args:
        block: a block of a timm model, on any device.
        narrow_attention: `Family.narrow_attention`.
    """
    mlp: Any = getattr(block, "mlp", None)
    attn: Any = getattr(block, "attn", None)
    hidden = mlp.fc1.out_features if is_plain_mlp(mlp) else None
    if narrow_attention is None or not is_plain_attention(attn):
        return Widths(hidden)
    head_dim = attn.proj.in_features // attn.num_heads
    return Widths(hidden, head_dim, head_dim)


def narrowed_shapes(block: Any, widths: Widths) -> dict[str, tuple[int, int]]:
    """Return the new shapes `[out, in]` of the layers that `widths` changes, by name.

    Args:
        block: a block of the source.
        widths: at most those of the block.
    """
    shapes: dict[str, tuple[int, int]] = {}
    if widths.hidden is not None:
        shapes["mlp.fc1"] = (widths.hidden, block.mlp.fc1.in_features)
        shapes["mlp.fc2"] = (block.mlp.fc2.out_features, widths.hidden)
    if widths.qk is not None or widths.v is not None:
        num_heads = block.attn.num_heads
        head_dim = block.attn.proj.in_features // num_heads
        qk, v = widths.qk or head_dim, widths.v or head_dim
        shapes["attn.qkv"] = (num_heads * (2 * qk + v), block.attn.qkv.in_features)
        shapes["attn.proj"] = (block.attn.proj.out_features, num_heads * v)
    return shapes


def narrow_block(block: Any, widths: Widths, narrow_attention: Callable[[Any], nn.Module] | None) -> None:
    """Make `block` narrower, in place.

    It keeps the first neurons and channels, which a start then replaces by better ones.

    Args:
        block: a block of a timm model, on any device, including meta.
        widths: at most those of the block.
        narrow_attention: `Family.narrow_attention`.
    """
    for name, shape in narrowed_shapes(block, widths).items():
        old = block.get_submodule(name)
        rows, columns = (torch.arange(size, device=old.weight.device) for size in shape)
        if name == "attn.qkv":
            head_dim = old.out_features // (3 * block.attn.num_heads)
            rows = _first_channels(block.attn, head_dim, [widths.qk or head_dim] * 2 + [widths.v or head_dim])
        elif name == "attn.proj":
            head_dim = old.in_features // block.attn.num_heads
            columns = _first_channels(block.attn, head_dim, [widths.v or head_dim])
        new = nn.Linear(shape[1], shape[0], bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(old.weight[rows][:, columns])
            if old.bias is not None:
                new.bias.copy_(old.bias[rows])
        block.set_submodule(name, new)
        if name == "attn.proj":
            assert narrow_attention is not None
            block.attn = narrow_attention(block.attn)


def is_plain_mlp(mlp: Any) -> bool:
    """Return whether `mlp` can lose hidden neurons.

    Its neurons must be independent of each other, and its layers must have biases, which absorb
    what the removed neurons contribute on average.
    """
    return type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and None not in (mlp.fc1.bias, mlp.fc2.bias)


def is_plain_attention(attn: Any) -> bool:
    """Return whether `attn` can get narrower heads.

    It must be timm's `Attention` with linear projections and neither norms nor a gate. The type
    must match exactly: others (differential attention) look alike and compute something else.
    """
    if type(attn) is not Attention or getattr(attn, "gate", None) is not None:
        return False
    norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm")]
    if any(not isinstance(norm, (nn.Identity, type(None))) for norm in norms):
        return False
    qkv, proj = getattr(attn, "qkv", None), getattr(attn, "proj", None)
    return isinstance(qkv, nn.Linear) and qkv.bias is not None and getattr(proj, "bias", None) is not None


def _first_channels(attn: Any, head_dim: int, counts: Sequence[int]) -> Tensor:
    """Return the indices of the channels that stay: the first ones of each head.

    Args:
        attn: timm's attention.
        head_dim: channels per head of the source.
        counts: channels per head that stay, for each of the parts side by side, such as q, k and v.
    """
    return torch.cat([
        torch.arange(count, device=attn.proj.weight.device) + (part * attn.num_heads + head) * head_dim
        for part, count in enumerate(counts) for head in range(attn.num_heads)
    ])  # fmt: skip
