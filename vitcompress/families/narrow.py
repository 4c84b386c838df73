"""How does a block get narrower?  Fewer hidden neurons in its MLP, fewer channels in its heads.

    MLP      fc1 [hidden, C]            fc2 [C, hidden]       hidden ≤ the teacher's
    heads    q, k [H·qk, C], v [H·v, C]   proj [C, H·v]       qk, v ≤ the teacher's; the scale of the logits stays

Queries and keys meet only in their product, values and the projection in theirs: each pair may have a width of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from vitcompress.families.widths import Widths


def full_widths(block: Any, narrow_attention: Callable[[Any], nn.Module] | None) -> Widths:
    """The widths that `block` has, as far as they can be changed.

    Args:
        block: of a timm model, on any device.
        narrow_attention: the family's narrow attention; None where it has none.
    """
    mlp: Any = getattr(block, "mlp", None)
    attn: Any = getattr(block, "attn", None)
    hidden = mlp.fc1.out_features if plain_mlp(mlp) else None
    if narrow_attention is None or not plain_attention(attn):
        return Widths(hidden)
    width = attn.proj.in_features // attn.num_heads
    return Widths(hidden, width, width)


def narrowed_shapes(block: Any, widths: Widths) -> dict[str, tuple[int, int]]:
    """Shapes of the layers that `widths` changes, by their names inside the block.

    Args:
        block: of the teacher.
        widths: not above the block's own.
    """
    shapes: dict[str, tuple[int, int]] = {}
    if widths.hidden is not None:
        shapes["mlp.fc1"] = (widths.hidden, block.mlp.fc1.in_features)
        shapes["mlp.fc2"] = (block.mlp.fc2.out_features, widths.hidden)
    if widths.qk is not None or widths.v is not None:
        heads, width = block.attn.num_heads, block.attn.proj.in_features // block.attn.num_heads
        qk, v = widths.qk or width, widths.v or width
        shapes["attn.qkv"] = (heads * (2 * qk + v), block.attn.qkv.in_features)
        shapes["attn.proj"] = (block.attn.proj.out_features, heads * v)
    return shapes


def narrow_block(block: Any, widths: Widths, narrow_attention: Callable[[Any], nn.Module] | None) -> None:
    """Make `block` narrower, in place: it keeps the first neurons and channels, until a start chooses better ones.

    Args:
        block: of a timm model, on any device; meta will do.
        widths: not above the block's own.
        narrow_attention: the family's, made from timm's.
    """
    for name, shape in narrowed_shapes(block, widths).items():
        owner = block.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        old = getattr(owner, leaf)
        rows = _first_rows(block, widths) if name == "attn.qkv" else torch.arange(shape[0])
        columns = _first_channels(block, shape[1]) if name == "attn.proj" else torch.arange(shape[1])
        new = nn.Linear(shape[1], shape[0], bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            rows, columns = rows.to(old.weight.device), columns.to(old.weight.device)
            new.weight.copy_(old.weight[rows][:, columns])
            if old.bias is not None:
                new.bias.copy_(old.bias[rows])
        setattr(owner, leaf, new)
        if name == "attn.proj":
            assert narrow_attention is not None
            block.attn = narrow_attention(block.attn)


def project_narrow(attn: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split what `attn.qkv` gives into queries, keys `[B, H, N, qk]` and values `[B, H, N, v]`.

    Args:
        attn: holds `num_heads` and `proj`, whose inputs tell the width of the values.
        qkv: `[B, N, H·(2·qk + v)]`.
    """
    v_width = attn.proj.in_features
    qk_width = (qkv.shape[-1] - v_width) // 2
    parts = qkv.split([qk_width, qk_width, v_width], dim=-1)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in parts)
    return q, k, v


def plain_mlp(mlp: Any) -> bool:
    """Whether the neurons of `mlp` act one by one and its biases take up what the others leave."""
    return type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and None not in (mlp.fc1.bias, mlp.fc2.bias)


def plain_attention(attn: Any) -> bool:
    """Whether queries, keys and values are linear in the input, with nothing per channel between their products.

    timm's own, exactly: others (differential attention) look alike and compute something else.
    """
    if type(attn) is not Attention:
        return False
    parts = [getattr(attn, name, None) for name in ("q_norm", "k_norm", "norm")]
    if getattr(attn, "gate", None) is not None or any(
        not isinstance(part, (nn.Identity, type(None))) for part in parts
    ):
        return False
    qkv, proj = getattr(attn, "qkv", None), getattr(attn, "proj", None)
    return isinstance(qkv, nn.Linear) and qkv.bias is not None and getattr(proj, "bias", None) is not None


def _first_rows(block: Any, widths: Widths) -> Tensor:
    """Rows of `qkv` that a narrower one keeps: the first channels of each head, of queries, keys and values."""
    heads, width = block.attn.num_heads, block.attn.qkv.out_features // (3 * block.attn.num_heads)
    kept = [widths.qk or width, widths.qk or width, widths.v or width]
    return torch.cat([
        torch.arange(count) + (part * heads + head) * width
        for part, count in enumerate(kept) for head in range(heads)
    ])  # fmt: skip


def _first_channels(block: Any, count: int) -> Tensor:
    """Columns of `proj` that a narrower one keeps: the first channels of each head."""
    heads, width = block.attn.num_heads, block.attn.proj.in_features // block.attn.num_heads
    return torch.cat([torch.arange(count // heads) + head * width for head in range(heads)])
