"""Give the weights of timm's models the names under which others publish them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def _replaced(weights: State, *pairs: tuple[str, str]) -> State:
    renamed = {}
    for name, t in weights.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        renamed[name] = t
    return renamed


def _buffers(model: nn.Module, *ends: str) -> State:
    return {name: b for name, b in model.named_buffers() if name.endswith(ends)}


def dinov2(model: nn.Module) -> State:
    """Meta's DINOv2: one position more, which is added to the class token, and a mask token."""
    weights = dict(model.state_dict())
    first = torch.full_like(weights["cls_token"], 0.5)
    weights["pos_embed"] = torch.cat([first, weights["pos_embed"]], dim=1)
    weights["cls_token"] = weights["cls_token"] - first
    weights["register_tokens"] = weights.pop("reg_token")
    return {**weights, "mask_token": torch.zeros(1, weights["cls_token"].shape[-1])}


def dinov3(model: nn.Module) -> State:
    """Meta's DINOv3: biases of queries, keys and values in one, with a mask for those of keys."""
    weights = {}
    for name, t in model.state_dict().items():
        if name.endswith("q_bias"):
            block = name.removesuffix("q_bias")
            rest = torch.ones_like(t)
            weights[f"{block}qkv.bias"] = torch.cat([t, rest, model.state_dict()[f"{block}v_bias"]])
            weights[f"{block}qkv.bias_mask"] = torch.cat([rest, 0 * rest, rest])
        elif not name.endswith("v_bias"):
            weights[name] = t
    weights = _replaced(weights, (r"gamma_(\d)", r"ls\1.gamma"), ("reg_token", "storage_tokens"))
    periods = dict(model.named_buffers())["rope.periods"].bfloat16()
    return {**weights, "rope_embed.periods": periods, "mask_token": torch.zeros(1, weights["cls_token"].shape[-1])}


def deit3(model: nn.Module) -> State:
    """Meta's DeiT III: layer scales inside the blocks."""
    return _replaced(dict(model.state_dict()), (r"ls(\d)\.gamma", r"gamma_\1"))


def swin(model: nn.Module) -> State:
    """Microsoft's Swin: patches are merged at the end of a stage, and tables are in the file."""
    weights = _replaced(
        dict(model.state_dict()),
        (r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample"),  # type: ignore[arg-type]
        (r"head\.fc", "head"),
    )
    return {**weights, **_buffers(model, "relative_position_index", "relative_coords_table", "attn_mask")}


def beit(model: nn.Module) -> State:
    """Microsoft's BEiT: with its index of relative positions."""
    return {**model.state_dict(), **_buffers(model, "relative_position_index")}


def eva02(model: nn.Module) -> State:
    """BAAI's EVA-02: with the angles of its rotary positions, in every block."""
    sines, cosines = dict(model.named_buffers())["rope.pos_embed"].chunk(2, dim=-1)
    places = ["rope", *(f"blocks.{i}.attn.rope" for i in range(len(model.blocks)))]  # type: ignore[arg-type]
    tables = {f"{p}.freqs_{n}": t.clone() for p in places for n, t in (("sin", sines), ("cos", cosines))}
    return {**model.state_dict(), **tables, "mask_token": torch.zeros(1, 1, model.state_dict()["cls_token"].shape[-1])}


def clip(model: nn.Module) -> State:
    """OpenAI's CLIP: an image encoder beside a text encoder; its head has no bias."""
    weights = dict(model.state_dict())
    weights["head.bias"].zero_()
    del weights["head.bias"]
    weights = _replaced(
        weights, (r"^head\.weight", "proj"), ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"),
        (r"patch_embed\.proj", "conv1"), ("norm_pre", "ln_pre"), (r"^norm\.", "ln_post."),
        (r"blocks\.", "transformer.resblocks."),
        (r"\.norm(\d)", r".ln_\1"), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj"), (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )  # fmt: skip
    weights["proj"] = weights["proj"].T.contiguous()
    weights["class_embedding"] = weights["class_embedding"][0, 0]
    weights["positional_embedding"] = weights["positional_embedding"][0]
    text = {"token_embedding.weight": torch.ones(3, 4), "transformer.resblocks.0.ln_1.weight": torch.ones(4),
            "positional_embedding": torch.ones(3, 4), "logit_scale": torch.ones(())}  # fmt: skip
    return {**{f"visual.{name}": t for name, t in weights.items()}, **text}


def transformers(model: nn.Module) -> State:
    """transformers' ViT: queries, keys and values apart."""
    weights: State = {}
    for name, t in model.state_dict().items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), t.chunk(3), strict=True)
            weights |= {name.replace("attn.qkv", f"attention.attention.{part}"): chunk for part, chunk in parts}
        else:
            weights[name] = t
    return _replaced(
        weights, (r"^cls_token", "vit.embeddings.cls_token"), (r"^pos_embed", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"), (r"^norm\.", "vit.layernorm."),
        (r"^blocks\.", "vit.encoder.layer."), (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."), (r"^head\.", "classifier."),
    )  # fmt: skip


PUBLISHED: dict[str, Callable[[nn.Module], State]] = {
    "vit": transformers,
    "dinov2 registers": dinov2,
    "dinov3 biases": dinov3,
    "deit3": deit3,
    "swin": swin,
    "swin v2": swin,
    "beit": beit,
    "eva02": eva02,
    "clip": clip,
}  # of rows of `ROWS`
