"""State dicts that are changed at random are refused, told of, or give the same logits."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.factories import ROWS, build, row_images
from tests.pretrained.published import PUBLISHED
from vitcompress.errors import CheckpointError
from vitcompress.pretrained.fit import fit
from vitcompress.pretrained.states import find_weights

State = dict[str, Tensor]
MODELS = (
    "vit", "dinov2 registers", "deit3", "clip", "swin", "swin v2", "beit", "beit shared bias", "eva", "eva02",
    "dinov3 biases",
)  # fmt: skip
CASES = 2000

SYNONYMS = (
    ("norm.", "fc_norm."), ("fc_norm.", "norm."), ("head.", "fc."), ("head.", "head.fc."), ("mlp.fc1.", "mlp.w12."),
    ("mlp.fc2.", "mlp.w3."), ("mlp.fc1_g.", "mlp.w1."), ("ls1.gamma", "gamma_1"), ("gamma_1", "ls1.gamma"),
    ("reg_token", "register_tokens"), ("reg_token", "storage_tokens"), ("q_bias", "v_bias"), ("qkv.", "in_proj_"),
    ("mlp.norm.", "mlp.ffn_ln."), ("blocks.", "transformer.resblocks."), ("cls_token", "class_embedding"),
    ("patch_embed.proj.", "conv1."), ("patch_embed.", "visual.trunk.patch_embed."), ("layers.1.", "layers.0."),
    ("layernorm_before", "norm1"), ("query", "key"), ("vit.", ""), ("vit.", "model.vit."),
    ("encoder.layer.", "blocks."),
)  # fmt: skip
ADDED = (
    "mask_token", "storage_tokens", "register_tokens", "fc_norm.weight", "norm.weight", "norm.bias", "head.weight",
    "pre_logits.fc.weight", "pre_logits.weight", "head_dist.weight", "rope.freqs", "rope.periods", "rope.weight",
    "blocks.0.attn.k_bias", "blocks.0.attn.q_norm.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias",
    "blocks.9.norm1.weight", "layers.0.downsample.reduction.weight", "relative_position_index", "encoder", "model",
    "module", "state_dict", "visual.class_embedding", "visual.conv1.weight", "conv1.weight", "visual.proj",
    "lm_head.weight",
    "blocks.0.attn.relative_position_index", "layers.0.blocks.1.attn_mask",
    "layers.0.blocks.0.attn.relative_coords_table",
    "blocks.0.attn.q_proj.weight", "blocks.0.gamma_1", "n_averaged", "blocks.0.total_ops", "beit3.x", "text.x",
    "layers.0.blocks.0.attn.relative_position_index", "attn_pool.latent", "norm_pre.weight", "decoder_embed.weight",
    "rel_pos_bias.relative_position_bias_table", "local_cls_norm.weight", "projectors.0.weight",
    "vit.embeddings.mask_token", "pooler.dense.weight", "vit.layernorm.weight", "classifier.bias",
    "vit.encoder.layer.0.attention.attention.query.bias",
)  # fmt: skip
QUIET = ("n_averaged", "blocks.0.total_ops")
PREFIXES = (
    "module.",
    "model.",
    "backbone.",
    "module.model.",
    "encoder.",
    "teacher.",
    "_orig_mod.",
    "student.backbone.",
)


class Model(NamedTuple):
    model: nn.Module
    weights: State
    published: State
    images: Tensor
    logits: Tensor


@cache
def original(name: str) -> Model:
    model = build(ROWS[name])
    images = row_images(ROWS[name])
    published = PUBLISHED[name](model) if name in PUBLISHED else dict(model.state_dict())
    with torch.no_grad():
        return Model(model, dict(model.state_dict()), published, images, model(images))


def rename(weights: State, rng: random.Random) -> State:
    kind = rng.randrange(5)
    names = list(weights)
    one = rng.choice(names)
    if kind == 0:
        return {(f"{n}_" if n == one else n): t for n, t in weights.items()}
    if kind == 1:
        prefix = rng.choice(PREFIXES)
        return {prefix + n: t for n, t in weights.items()}
    if kind == 2:
        prefix = rng.choice(PREFIXES)
        return {(prefix + n if n == one else n): t for n, t in weights.items()}
    if kind == 3:
        other = rng.choice(names)
        return {(other if n == one else n): t for n, t in weights.items() if n != other}
    fitting = [pair for pair in SYNONYMS if any(pair[0] in n for n in names)]
    old, new = rng.choice(fitting or [("", "x.")])
    matching = [n for n in names if old in n]
    chosen = matching if rng.random() < 0.7 else [rng.choice(matching)]
    return {(n.replace(old, new) if n in chosen else n): t for n, t in weights.items()}


def drop(weights: State, rng: random.Random) -> State:
    one = rng.choice(list(weights))
    start = rng.choice((one, one.rpartition(".")[0] or one, one.partition(".")[0]))
    return {n: t for n, t in weights.items() if not n.startswith(start)} or dict(list(weights.items())[1:])


def add(weights: State, rng: random.Random) -> State:
    name = rng.choice(ADDED) if rng.random() < 0.8 else rng.choice(list(weights)) + ".extra"
    like = rng.choice(list(weights.values()))
    return {name: torch.randn(like.shape), **{n: t for n, t in weights.items() if n != name}}


def reshape(weights: State, rng: random.Random) -> State:
    sized = [n for n in weights if any(part in n for part in ("pos_embed", "table", "patch_embed"))]
    one = rng.choice(sized if sized and rng.random() < 0.5 else list(weights))
    t = weights[one]
    changes: list[Callable[[], Tensor]] = [
        t.flatten, lambda: t[None], lambda: t.squeeze(), lambda: t.reshape(-1, 2), lambda: t.reshape(2, -1),
        lambda: t[..., :-1], lambda: t[1:], lambda: torch.cat([t, t]), lambda: t.repeat_interleave(2, dim=-1),
        lambda: t.flatten(1), lambda: t[:, 1:], lambda: torch.cat([t, t[:, 1:]], dim=1), lambda: t.to(torch.int8),
        lambda: torch.randn(1, 1 + rng.randrange(1, 9) ** 2, t.shape[-1]), lambda: torch.randn(*t.shape[:2], 4, 4),
        lambda: torch.randn(*t.shape[:-2], 2, 2), lambda: torch.randn((2 * rng.randrange(1, 8) - 1) ** 2, t.shape[-1]),
        lambda: torch.randn((2 * rng.randrange(1, 8) - 1) ** 2 + 3, t.shape[-1]), lambda: t.half(),
    ]  # fmt: skip
    try:
        return {**weights, one: rng.choice(changes)()}
    except (RuntimeError, IndexError):
        return {**weights, one: t.flatten()[1:]}


def resize(weights: State, rng: random.Random) -> State:
    sizes = {n: t for n, t in weights.items() if "pos" in n.lower() or "patch_embed.proj.weight" in n}
    one = rng.choice(list(sizes or weights))
    t, side = weights[one], rng.randrange(1, 8)
    if t.ndim == 4:
        return {**weights, one: torch.randn(*t.shape[:2], side, side)}
    if t.ndim == 3:
        return {**weights, one: torch.randn(1, side**2 + rng.randrange(3), t.shape[-1])}
    if "table" not in one:
        return reshape(weights, rng)
    extra = 3 * rng.randrange(2)
    tables = [n for n in weights if n.endswith("bias_table")] if rng.random() < 0.7 else [one]
    return {**weights, **{n: torch.randn((2 * side - 1) ** 2 + extra, weights[n].shape[-1]) for n in tables}}


def transpose(weights: State, rng: random.Random) -> State:
    """Permute the axes of a tensor so that its shape changes: of a square nothing could be seen."""
    one = rng.choice([n for n, t in weights.items() if t.ndim > 1] or list(weights))
    axes = list(range(weights[one].ndim))
    rng.shuffle(axes)
    permuted = weights[one].permute(axes).contiguous()
    return {**weights, one: permuted if permuted.shape != weights[one].shape else permuted.flatten()}


TELLS = ("resampled", "reshaped", "renamed", "cut from", "computed from")
CHANGES = (rename, drop, add, reshape, resize, transpose)


def check(seed: int) -> str:
    """Change the state dict of a model and load it; return what became of it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, change = rng.choice(MODELS), rng.choice(CHANGES)
    model, weights, published, images, logits = original(name)
    given = published if rng.random() < 0.5 else weights
    changed = change(given, rng)
    if rng.random() < 0.25:
        changed = rng.choice(CHANGES)(changed, rng)
    tree = {"model": changed, "epoch": 1} if rng.random() < 0.2 else changed
    try:
        found = find_weights(tree, weights.keys(), what="--checkpoint w.pth")
        fitted = fit(model, found.tensors, "--checkpoint w.pth")
    except CheckpointError:
        return "refused"
    notes = " ".join((*found.notes, *fitted.notes))
    extra = [n for n in changed if n.removesuffix(".extra") in given or (n in ADDED and n not in QUIET)]
    extra = [n for n in extra if n not in given]
    assert not extra or "left out" in notes or "renamed" in notes, (name, change, extra, notes)
    other_values = any(
        n in given and t.shape == given[n].shape and bool((t != given[n]).any()) for n, t in changed.items()
    )
    student = build(ROWS[name])
    student.load_state_dict(fitted.tensors)
    with torch.no_grad():
        difference = float((student(images) - logits).abs().max())
    if difference < 0.02 or other_values:  # values alone cannot be seen
        return "same"
    assert any(word in notes for word in TELLS), (
        name,
        change,
        difference,
        notes,
    )
    return "told"


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_state_dict_is_never_silently_another(seed: int) -> None:
    check(seed)


@pytest.mark.slow
def test_no_changed_state_dict_of_thousands_is_silently_another() -> None:
    outcomes = [check(seed) for seed in range(CASES)]
    assert set(outcomes) == {"refused", "same", "told"}
