"""List the tensors of a checkpoint that its model needs no place for, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_TOLERANCE = 2e-2  # of tables in half precision


@dataclass(frozen=True)
class _Kind:
    """Tensors that can be left out.

    Attributes:
        names: matches the whole name.
        reason: why; empty where nobody needs to be told.
        where: matches a name that the same checkpoint must have.
        headless: only where the model is built without classes.
        single: only a single number.
    """

    names: re.Pattern[str]
    reason: str = ""
    where: re.Pattern[str] = re.compile(r"")
    headless: bool = False
    single: bool = False


def _kind(names: str, reason: str = "", *, where: str = "", **only: bool) -> _Kind:
    return _Kind(re.compile(names), reason, re.compile(where), **only)


_KINDS = (
    _kind(r"(.*\.)?(n_averaged|total_ops|total_params)"),  # counters of torch's AveragedModel and of thop
    _kind(r"(global_)?(epochs?|steps?|iter(ation)?s?)|num_(updates|steps)|best_\w+|version|initted",
          "counts of training are not part of the model", single=True),
    _kind(r"(.*[._])?mask_token(\.weight)?", "mask tokens stand for hidden patches in pretraining only"),
    _kind(r"(criterion|loss|loss_fn|train_\w+|val_\w+|test_\w+|metrics?|mixup)\..*", "losses and metrics are not part "
          "of the model"),
    _kind(r"(module\.)?(token_embedding|text_projection|ln_final|text|text_model|transformer\.resblocks|"
          r"positional_embedding|logit_scale|logit_bias)(\..*)?",
          "the text encoder takes no images", where=r"(module\.)?visual\..*"),
    _kind(r"beit3\.text_embed\.weight|beit3\..*\.B\..*", "BEiT-3's layers for text take no images"),
    _kind(r"beit3\.encoder\.embed_positions\.A\.weight"),  # its first two rows are never read
    # what follows the backbone is left out only of a model that ends with it
    _kind(r"(head|head\.fc|head_dist|fc|classifier|pre_logits(\.fc)?)\.(weight|bias)",
          "the model is built without a classifier", headless=True),
    _kind(r"pooler\..*", "the pooler of transformers is not part of timm's models", headless=True),
    _kind(r"lm_head\.(weight|bias)", "the head that predicts hidden patches is for pretraining only", headless=True),
    _kind(r"(.*\.)?head\.(mlp|last_layer|mlp2|last_layer2)\..*|(dino|ibot)_head\..*",
          "the projection head of DINO and iBOT is for pretraining only", headless=True),
    _kind(r"projectors\..*|local_cls_norm\..*", "projections of distillation are for pretraining only", headless=True),
    _kind(r"decoder_(embed|blocks|norm|pred|pos_embed)(\..*)?", "the decoder of a masked autoencoder is for "
          "pretraining only", headless=True),
    _kind(r"(.*\.)?(projector|predictor|head\.\d+)\..*|queue|queue_ptr", "projections of contrastive learning are for "
          "pretraining only", headless=True),
)  # fmt: skip

# timm computes these from the sizes of image and window
_COMPUTED = re.compile(
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|k_bias|"
    r"rope(_embed)?\.(periods|freqs_cos|freqs_sin|inv_freq|bands|pos_embed|t_x|t_y))"
)


def split_off(weights: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Split off what a model needs no place for.

    Args:
        weights: tensors by name.
        model: the model, on any device but meta.

    Returns:
        The other tensors; reasons to tell; and faults: tables that the model computes otherwise.
    """
    expected, buffers = model.state_dict().keys(), dict(model.named_buffers())
    headless = getattr(model, "num_classes", None) == 0
    rest, faults = {}, []
    left: dict[str, list[str]] = {}
    for name, t in weights.items():
        if name in expected:
            rest[name] = t
        elif _COMPUTED.fullmatch(name):
            reason, fault = _compare_table(name, t, _own_table(name, buffers))
            faults += [fault] if fault else []
            if reason:
                left.setdefault(reason, []).append(name)
        elif (known := _reason(name, weights, headless=headless)) is None:
            rest[name] = t
        elif known:
            left.setdefault(known, []).append(name)
    told = [f"left out {_first(names)}: {reason}." for reason, names in left.items()]
    return rest, told, faults


def _reason(name: str, weights: Mapping[str, Tensor], *, headless: bool) -> str | None:
    """Return why a tensor can be left out, empty if nobody needs to know; None if it cannot be."""
    for kind in _KINDS:
        allowed = (headless or not kind.headless) and (weights[name].numel() == 1 or not kind.single)
        if allowed and kind.names.fullmatch(name) and any(kind.where.match(other) for other in weights):
            return kind.reason
    return None


def _own_table(name: str, buffers: Mapping[str, Tensor]) -> Tensor | None:
    """Return the table of the model that is called `name` in a file; None if it has none."""
    angles = buffers.get("rope.pos_embed")  # one for all blocks, sines beside cosines
    if angles is not None and name.endswith(("rope.freqs_sin", "rope.freqs_cos")):
        return angles.chunk(2, dim=-1)[name.endswith("cos")]
    return buffers.get(name.replace("rope_embed.", "rope."))


def _compare_table(name: str, t: Tensor, buffer: Tensor | None) -> tuple[str, str]:
    """Compare a table of the file with the model's, which timm computes.

    Returns:
        What to tell, and what is wrong; both empty where the tables are the same.
    """
    if buffer is not None and name.endswith("relative_coords_table") and buffer.shape != t.shape:
        own, old = ("x".join(str((side + 1) // 2) for side in table.shape[1:3]) for table in (buffer, t))
        return f"the model computes it, for windows of {own} instead of {old}", ""
    if buffer is None or buffer.shape != t.shape:
        return "the model computes it, for its own sizes", ""
    scale = max(float(buffer.float().abs().max()), 1e-6) if buffer.numel() else 1.0
    if torch.allclose(t.float(), buffer.float(), rtol=_TOLERANCE, atol=_TOLERANCE * scale):
        return "", ""
    return "", f"table: {name} {tuple(t.shape)} differs from the one that the model computes"


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
