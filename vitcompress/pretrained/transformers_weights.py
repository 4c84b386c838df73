"""Rename the tensors of a transformers checkpoint to timm's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitcompress.errors import CheckpointError

# applied in this order to every name
_RENAMES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(vit|deit|dinov2|dinov2_with_registers|swin)\.", ""),
        (r"^embeddings\.mask_token$", "mask_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^encoder\.layer\.", "blocks."),
        # transformers merges patches at the end of a stage, timm at the start of the next
        (r"^encoder\.layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample."),
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
    """Return whether a state dict has the names of transformers' ViT, DeiT, DINOv2 or Swin."""
    return any(re.search(r"(^|\.)embeddings\.patch_embeddings\.projection\.weight$", name) for name in weights)


def to_timm_weights(weights: Mapping[str, Tensor], *, what: str) -> dict[str, Tensor]:
    """Return the state dict under timm's names, with queries, keys and values fused.

    Args:
        weights: state dict under transformers' names.
        what: the flag and the file, at the start of messages.

    Raises:
        CheckpointError: two tensors get one name.
    """
    weights = _without_prefix(weights)
    renamed: dict[str, Tensor] = {}
    for name, t in weights.items():
        timm_name = _rename(name)
        if timm_name in renamed:
            raise CheckpointError(f"{what}: two tensors have the name {timm_name} in timm, one of them is {name}.")
        renamed[timm_name] = t
    timm_weights = _fuse_qkv(renamed)
    is_swin = "layers.0.blocks.0.norm1.weight" in timm_weights
    if is_swin and not any(name.startswith("head.fc.") for name in timm_weights):
        # timm's Swin keeps its classifier in a pooling head
        timm_weights = {re.sub(r"^head\.", "head.fc.", name): t for name, t in timm_weights.items()}
    if "dist_token" in timm_weights and not {"head_dist.weight", "reg_token"} & timm_weights.keys():
        timm_weights["reg_token"] = timm_weights.pop("dist_token")
    if "reg_token" in timm_weights and any(name.endswith("embeddings.register_tokens") for name in weights):
        # timm gives registers no position embedding and adds that of the class token to the token
        position = timm_weights.get("pos_embed")
        if position is not None and position.ndim == 3 and "cls_token" in timm_weights:
            timm_weights["cls_token"] = timm_weights["cls_token"] + position[:, :1]
            timm_weights["pos_embed"] = position[:, 1:]
    return timm_weights


def _without_prefix(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights without what stands before the backbone's name, as in `model.vit.norm`."""
    for name in weights:
        match = re.match(r"(.+\.)(vit|deit|dinov2|dinov2_with_registers|swin)\.embeddings\.patch_embeddings\.", name)
        if match and not any(name.removeprefix(match[1]) in weights for name in weights if name.startswith(match[1])):
            return {name.removeprefix(match[1]): t for name, t in weights.items()}
    return weights


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def _fuse_qkv(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate `query`, `key` and `value` of each block to one `qkv`.

    The three stay as they are where a block lacks one of them, they differ in shape, or there is
    a `qkv` beside them.
    """
    fused = dict(weights)
    for name, query in weights.items():
        if ".attn.query." not in name:
            continue
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        qkv = name.replace(".query.", ".qkv.")
        if qkv not in weights and all(part in weights and weights[part].shape == query.shape for part in names):
            fused[qkv] = torch.cat([fused.pop(part) for part in names])
    return fused
