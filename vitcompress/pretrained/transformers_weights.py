"""Rename the tensors of a transformers checkpoint to timm's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# applied in this order to every name; what becomes empty is left out
_RENAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(vit|deit|dinov2|dinov2_with_registers|swin)\.", ""),
        (r"^(pooler\..*|embeddings\.mask_token|.*\.relative_position_index)$", ""),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^encoder\.layer\.", "blocks."),
        # transformers merges patches at the end of a stage, timm at the start of the next
        (r"^encoder\.layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample."),
        (r"^encoder\.layers\.", "layers."),
        (r"\.attention\.(attention|self)\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^(cls_)?classifier\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
    )
)


def has_transformers_names(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is one of transformers' ViT, DeiT, Dinov2 or Swin."""
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", name) for name in weights)


def to_timm_weights(weights: Mapping[str, Tensor], *, headless: bool = False) -> dict[str, Tensor]:
    """The state dict under timm's names, queries, keys and values in one.

    Args:
        weights: as transformers names them.
        headless: leave the classifier out.
    """
    renamed = {new: t for name, t in weights.items() if (new := _rename(name))}
    found = _fuse_qkv(renamed)
    if "layers.0.blocks.0.norm1.weight" in found:  # timm's Swin keeps its classifier in a pooling head
        found = {re.sub(r"^head\.", "head.fc.", name): t for name, t in found.items()}
    if "head_dist.weight" not in found and "dist_token" in found:
        found["reg_token"] = found.pop("dist_token")
    if any(name.endswith("embeddings.register_tokens") for name in weights):
        # timm's registers have no position, and the class token holds its own
        position = found["pos_embed"]
        found |= {"cls_token": found["cls_token"] + position[:, :1], "pos_embed": position[:, 1:]}
    return {name: t for name, t in found.items() if not (headless and name.startswith("head"))}


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def _fuse_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `query`, `key` and `value` of each block into one `qkv`."""
    found: dict[str, Tensor] = {}
    for name, t in weights.items():
        if ".attn.query." in name:
            rest = [name.replace(".query.", f".{part}.") for part in ("key", "value")]
            if all(other in weights for other in rest):
                found[name.replace(".query.", ".qkv.")] = torch.cat([t, *(weights[other] for other in rest)])
        elif not re.search(r"\.attn\.(key|value)\.", name):
            found[name] = t
    return found
