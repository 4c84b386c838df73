"""Fit the tensors of a checkpoint to a model, and account for every one of them.

weights ── names of transformers or other publishers ──► names and shapes of the model

Each tensor is taken, renamed, resampled (and told), left out for a known reason, or refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcompress.errors import CheckpointError
from vitcompress.families.registry import find_family
from vitcompress.pretrained.left_out import split_off
from vitcompress.pretrained.quiet import without_library_output
from vitcompress.pretrained.transformers_weights import has_transformers_names, to_timm_weights

State = Mapping[str, Tensor]
Convert = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]

FIT_HINT = "Name the model that the weights belong to, or set its sizes with --model-arg key=value."
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Fitted:
    """A complete state dict of a model.

    Attributes:
        tensors: by name, of the model's shapes.
        notes: what was renamed, resampled and left out, in parts of a sentence.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def fit(model: nn.Module, weights: State, what: str) -> Fitted:
    """Return the weights under the names and in the shapes of a model.

    Args:
        model: the model, on the CPU; not changed.
        weights: tensors by name, as the file has them.
        what: the flag and the file, at the start of messages.

    Raises:
        CheckpointError: a tensor is missing, does not fit, or would be lost.
    """
    named = _masked(weights)
    masked = [] if len(named) == len(weights) else ["the masks of biases (bias_mask) were multiplied in."]
    if has_transformers_names(named):
        named = to_timm_weights(named, what=what)
    rest, told, tables = split_off(named, model)
    faults = [*_mismatches(model, rest), *tables]
    if not faults:
        return Fitted(rest, (*masked, *told))
    named, renamed = _prepared(model, named)
    converted = _converted(model, named) if not tables else None
    if converted is None:
        raise _misfit(model, rest, faults, what)
    tensors, flow = converted
    lost = [f"dropped: {name} {tuple(named[name].shape)}" for name in _lost(model, named, flow)]
    if lost:
        hint = _advice(model, rest) or "The model has no place for them, so its outputs would be others. "
        if all("qkv.bias" in line for line in lost):
            hint = "DINOv3 with these biases has qkvb in its name. "
        raise _misfit(model, rest, lost, what, hint=hint + FIT_HINT)
    return Fitted(tensors, (*masked, *told, *renamed, *_changes(model, named, tensors, flow)))


def _misfit(model: nn.Module, weights: State, faults: list[str], what: str, *, hint: str = "") -> CheckpointError:
    """Return the error for weights that do not fit."""
    text = "\n".join(f"  {fault}" for fault in _shortened(faults))
    return CheckpointError(f"{what} does not fit the model:\n{text}", hint=hint or _advice(model, weights) + FIT_HINT)


def _shortened(faults: list[str]) -> list[str]:
    """Return of each kind of fault the first, the number of those left out, and the last."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.partition(":")[0], []).append(fault)
    lines = []
    for same in kinds.values():
        more = len(same) - 2
        lines += same if more <= 0 else [f"{same[0]} … ({more} more)", same[-1]]
    return lines


def _mismatches(model: nn.Module, weights: State) -> list[str]:
    """List missing and unexpected tensors, wrong shapes and wrong types."""
    expected = model.state_dict()
    both = [(name, t, expected[name]) for name, t in weights.items() if name in expected]
    return [
        *(f"missing: {name} {tuple(t.shape)}" for name, t in expected.items() if name not in weights),
        *(f"unexpected: {name} {tuple(t.shape)}" for name, t in weights.items() if name not in expected),
        *(f"shape: {name} is {tuple(t.shape)}, the model has {tuple(own.shape)}"
          for name, t, own in both if t.shape != own.shape),
        *(f"type: {name} holds {str(t.dtype).removeprefix('torch.')}, the model has real numbers"
          for name, t, own in both if own.is_floating_point() and not t.is_floating_point()),
    ]  # fmt: skip


def _advice(model: nn.Module, weights: State) -> str:
    """Say what tells the weights from the model: their width, or where the model pools."""
    expected = model.state_dict()
    for name, t in expected.items():
        if name.endswith(("norm1.weight", "norm.weight")) and name in weights and t.shape != weights[name].shape:
            return f"The weights are {weights[name].numel()} wide, the model {t.numel()}. "
    if "fc_norm.weight" in weights and "fc_norm.weight" not in expected:
        return "The weights pool over patches: try --model-arg global_pool=avg. "
    missing = [name for name in expected if name not in weights]
    if missing and all(re.match(r"(head|head\.fc|head_dist)\.(weight|bias)$", name) for name in missing):
        return "The weights have no classifier: --model-arg num_classes=0 builds the model without one. "
    if any(".pre_logits." in f".{name}" for name in weights):
        return "The weights have a layer before the head (pre_logits), which timm's models no longer have. "
    return ""


# --- conversion by timm, observed


@dataclass(frozen=True)
class _Flow:
    """What became of the tensors that a conversion was given.

    Attributes:
        sources: by name of a result, the names of the tensors that it is a view of.
        unread: by name of a tensor, its elements that no result is a view of, as a mask; none of
            the tensors that are wholly in the results.
        used: names of tensors whose unread elements flow into results by computation.
    """

    sources: dict[str, str]
    unread: dict[str, Tensor]
    used: frozenset[str]


def _converted(model: nn.Module, named: State) -> tuple[dict[str, Tensor], _Flow] | None:
    """Let timm convert weights of other names or sizes; None where the result does not fit."""
    family = find_family(model)
    if family is None:
        return None
    given = {name: t.detach().clone() for name, t in named.items()}  # one storage each
    tensors = _run(family.convert, model, given)
    if tensors is None:
        return None
    rest, _, tables = split_off(tensors, model)
    if tables or _mismatches(model, rest):
        return None
    sources, unread = _trace(given, rest)
    used = frozenset(
        name
        for name, mask in unread.items()
        if (name in rest and name not in sources) or _flows(family.convert, model, given, name, mask)
    )
    return rest, _Flow(sources, unread, used)


def _prepared(model: nn.Module, named: State) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the layer scales of DeiT III, as timm does for it alone; also return what to tell."""
    new = {name: re.sub(r"^(blocks\.\d+)\.gamma_(\d)$", r"\1.ls\2.gamma", name) for name in named}
    layer_scales = [name for name in new if new[name] != name]
    if not layer_scales or "blocks.0.ls1.gamma" not in model.state_dict() or len(set(new.values())) < len(new):
        return dict(named), []
    return {new[name]: t for name, t in named.items()}, [_renaming([f"{name} to {new[name]}" for name in layer_scales])]


def _masked(weights: State) -> dict[str, Tensor]:
    """Return weights with the mask of DINOv3 multiplied in, which voids the biases of keys."""
    masked = dict(weights)
    for name, mask in weights.items():
        bias = name.removesuffix("_mask")
        if name.endswith(".qkv.bias_mask") and bias in weights and weights[bias].shape == mask.shape:
            masked[bias] = weights[bias] * mask
            del masked[name]
    return masked


def _run(convert: Convert, model: nn.Module, given: State) -> dict[str, Tensor] | None:
    """Return the result of a conversion; None where it fails."""
    try:
        with without_library_output(), torch.no_grad():
            return convert(dict(given), model)
    except Exception:  # whatever indexing and reshaping raise; the names in the file are reported then
        return None


def _trace(given: State, results: State) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Follow tensors into the results of a conversion by their storage; see `_Flow`."""
    owners = {t.untyped_storage().data_ptr(): name for name, t in given.items() if t.numel()}
    masks: dict[str, Tensor] = {name: torch.ones(t.shape, dtype=torch.bool) for name, t in given.items()}
    sources = {}
    for name, t in results.items():
        owner = owners.get(t.untyped_storage().data_ptr())
        if owner is not None:
            sources[name] = owner
            torch.as_strided(masks[owner], t.shape, t.stride(), t.storage_offset()).fill_(False)
    return sources, {name: mask for name, mask in masks.items() if bool(mask.any())}


def _flows(convert: Convert, model: nn.Module, given: State, name: str, mask: Tensor) -> bool:
    """Return whether elements of a tensor flow into the results of a conversion."""
    t = given[name]
    if not t.is_floating_point():
        return False
    results = _run(convert, model, {**given, name: t.masked_fill(mask, math.nan)})
    expected = model.state_dict()
    return results is not None and any(bool(r.isnan().any()) for n, r in results.items() if n in expected)


def _lost(model: nn.Module, named: State, flow: _Flow) -> list[str]:
    """Return the names of tensors whose unread elements matter: neither zero nor listed."""
    rest, _, _ = split_off(named, model)
    names = []
    for name, t in rest.items():
        if name not in flow.unread or name in flow.used:
            continue
        mask = flow.unread[name]
        if name.endswith("bias") and not bool(t[mask].any()):
            continue  # adding zero changes nothing
        names.append(name)
    return names


def _changes(model: nn.Module, named: State, tensors: State, flow: _Flow) -> list[str]:
    """Say which tensors were resampled, from which sizes to which, and which were renamed."""
    resampled: dict[str, list[str]] = {}
    renamed = []
    for name, t in tensors.items():
        source = flow.sources.get(name)
        if source is None and name in named:
            line = _resampling(model, name, named[name], t)
            resampled.setdefault(line, []).append(name)
        elif source is not None and source != name:
            renamed.append(f"{source} to {name}")
        elif source is None:
            renamed.append(f"what became {name}")
        elif t.shape != named[name].shape:
            verb = "reshaped" if t.numel() == named[name].numel() else "cut"
            line = f"{name} {verb} from {_by(named[name].shape)} to {_by(t.shape)}"
            resampled.setdefault(line, []).append(name)
    lines = [f"{line}{f' ({len(names)} tensors)' if len(names) > 1 else ''}." for line, names in resampled.items()]
    if renamed:
        lines.append(_renaming(renamed))
    return lines


def _renaming(renamed: list[str]) -> str:
    if len(renamed) == 1:
        return f"{renamed[0].replace(' to ', ' was renamed to ')}."
    return f"{len(renamed)} tensors were renamed, such as {renamed[0]}."


def _resampling(model: nn.Module, name: str, before: Tensor, after: Tensor) -> str:
    """Say between which sizes a tensor was resampled."""
    if name.endswith("patch_embed.proj.weight") and before.ndim == after.ndim == 4:
        return f"patch embedding resampled from {_by(before.shape[2:])} to {_by(after.shape[2:])}"
    if name == "pos_embed":
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if grid is not None:
            num_prefix = after.shape[1] - math.prod(grid)
            count = before.shape[1] - num_prefix
            side = math.isqrt(count)
            old = f"{side}x{side}" if side**2 == count else f"{count} patches"
            return f"position embedding resampled from {old} to {_by(grid)}"
    if name.endswith("relative_position_bias_table") and before.ndim == after.ndim == 2:
        window = getattr(model.get_submodule(name.rpartition(".")[0]), "window_size", None)
        if window is not None:
            num_extra = after.shape[0] - math.prod(2 * side - 1 for side in window)
            side = (math.isqrt(before.shape[0] - num_extra) + 1) // 2
            return f"relative position bias resampled from window {side}x{side} to {_by(window)}"
    if before.shape == after.shape:
        return f"{name} computed from several tensors of the file"
    return f"{name} resampled from {_by(before.shape)} to {_by(after.shape)}"


def _by(sizes: torch.Size | tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
