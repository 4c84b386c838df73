"""Load a pretrained model: build it and fill every tensor with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.models import adapt_input_conv, load_state_dict_from_hf
from timm.models import load_pretrained as load_from_timm
from timm.models._hub import HF_WEIGHTS_NAME  # not exported by timm
from torch import nn

from vitcompress.errors import CheckpointError, first_line, shorten
from vitcompress.families.outputs import tell_outputs
from vitcompress.families.registry import find_family
from vitcompress.pretrained.build import build_model, empty_model
from vitcompress.pretrained.fit import FIT_HINT, fit
from vitcompress.pretrained.quiet import without_library_output
from vitcompress.pretrained.resolve import Source
from vitcompress.pretrained.states import Weights, find_weights, read_weights
from vitcompress.pretrained.weights_file import file_bytes
from vitcompress.runtime.caches import cache_hint

_MIN_CHECKED_NUMBERS = 1 << 28  # a gigabyte; for smaller models, all tensors that do not fit are listed
_PATCHES = "patch_embed.proj.weight"

Tell = Callable[[str], object]


def load_pretrained(source: Source, tell: Tell = lambda text: None) -> nn.Module:
    """Return the model of `source` with its weights, in float32, on CPU, in eval mode.

    Args:
        source: the model and the place of its weights.
        tell: receives sentences on what was done with the weights: which state of several was
            taken, and what was unwrapped, renamed, resampled and left out.

    Raises:
        ModelError: timm cannot build it.
        CheckpointError: the weights are missing, unreadable, not finite or of another model.
    """
    if source.checkpoint is not None:
        model = _from_checkpoint(source, source.checkpoint, tell)
    else:
        _check_head(source)
        model = _from_elsewhere(source, tell)
    not_finite = [name for name, t in model.state_dict().items() if not bool(torch.isfinite(t.float()).all())]
    if not_finite:
        raise CheckpointError(
            f"The weights of {source.checkpoint or source.name} are not finite: {shorten(not_finite, limit=3)}.",
            hint="The training run diverged: use an earlier checkpoint.",
        )
    return model.float().eval()


def _from_checkpoint(source: Source, path: Path, tell: Tell) -> nn.Module:
    """Build a model and load its weights from a file.

    Raises:
        CheckpointError: the file is unreadable, or its tensors are not those of the model.
    """
    is_own = source.name == f"local-dir:{path.parent}"
    what = f"MODEL {source.name}: {path.name}" if is_own else f"--checkpoint {path}"
    _check_file_size(path, source, what)
    model = build_model(source)
    weights = read_weights(path, model.state_dict().keys(), key=source.checkpoint_key, what=what)
    _fill(model, _in_channels(model, weights) if is_own else weights, what, tell)
    return model


def _check_file_size(path: Path, source: Source, what: str) -> None:
    """Reject a file that is too small for the model before memory for the model is allocated.

    Raises:
        CheckpointError: the file is too small.
    """
    if not path.is_file():
        return  # reading it reports what is wrong
    numbers, size = sum(t.numel() for t in empty_model(source).state_dict().values()), file_bytes(path)
    if numbers > 4 * size + _MIN_CHECKED_NUMBERS:  # at least a byte each; some may be tied
        raise CheckpointError(
            f"{what} does not fit the model: it has {size:,} bytes, but {source.name} has {numbers:,} numbers.",
            hint=FIT_HINT,
        )


def _fill(model: nn.Module, weights: Weights, what: str, tell: Tell) -> None:
    """Load weights into a model, in place, and tell what was done with them.

    Raises:
        CheckpointError: they do not fit.
    """
    fitted = fit(model, weights.tensors, what)
    model.load_state_dict(fitted.tensors)
    for note in (*weights.notes, *fitted.notes):
        tell(f"{what}: {note}")


def _in_channels(model: nn.Module, weights: Weights) -> Weights:
    """Return weights for the model's channels, where they are timm's for another number of them."""
    tensors, notes = dict(weights.tensors), []
    own = model.state_dict().get(_PATCHES)
    channels = own.shape[1] if own is not None and own.ndim == 4 else None
    for name, t in weights.tensors.items():
        if name.endswith(_PATCHES) and channels and t.ndim == 4 and t.shape[1] != channels:
            tensors[name] = adapt_input_conv(channels, t, base_chans=t.shape[1])
            notes.append(f"the patch embedding was changed from {t.shape[1]} to {channels} channels.")
    return replace(weights, tensors=tensors, notes=(*weights.notes, *notes))


def _from_elsewhere(source: Source, tell: Tell) -> nn.Module:
    """Build a model and load its weights from the Hub, or from where timm has them.

    Raises:
        CheckpointError: the weights cannot be fetched, or do not fit.
    """
    kind, _, place = source.name.partition(":")
    model = build_model(source)
    fetched: Mapping[str, Any] = {}
    try:
        with without_library_output():
            if find_family(model) is None:  # such as a convolutional teacher, which timm loads strictly
                name = source.name if kind == "hf-hub" else source.architecture
                model = timm.create_model(name, pretrained=True, **source.model_args)
            elif kind == "hf-hub":
                filename = source.pretrained_cfg.get("hf_hub_filename") or HF_WEIGHTS_NAME
                fetched = load_state_dict_from_hf(place, filename)
            else:
                fetched = _fetch_from_timm(model)
    except Exception as error:  # the Hub client raises dozens of types from three libraries
        raise CheckpointError(
            f"Cannot load the weights of {source.name}: {first_line(error).rstrip('.')}.",
            hint=cache_hint(error) or "Without a network, give a local file with --checkpoint FILE.",
        ) from error
    if fetched:
        what = f"MODEL {source.name}"
        weights = find_weights(fetched, model.state_dict().keys(), what=what)
        _fill(model, _in_channels(model, _without_map_pooling(model, weights)), what, tell)
    tell_outputs(model, source.outputs, name=source.name)
    return model


def _fetch_from_timm(model: nn.Module) -> dict[str, Any]:
    """Fetch the published weights of one of timm's models, as they are before timm converts them.

    Where timm has no such step, the model is filled and nothing is returned.
    """
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    fetched: dict[str, Any] = {}

    def keep(weights: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        fetched.update(weights)
        return model.state_dict()

    channels = (cfg.get("input_size") or (3,))[0]
    load_from_timm(model, cfg, num_classes=cfg.get("num_classes", 0), in_chans=channels, filter_fn=keep)
    return fetched


def _without_map_pooling(model: nn.Module, weights: Weights) -> Weights:
    """Return published weights of SigLIP without their pooling, where timm's model has another."""
    tensors = {name: t for name, t in weights.tensors.items() if "attn_pool." not in name}
    if len(tensors) == len(weights.tensors) or any("attn_pool." in name for name in model.state_dict()):
        return weights
    note = "its pooling by attention was left out, since the model pools otherwise."
    return replace(weights, tensors=tensors, notes=(*weights.notes, note))


def _check_head(source: Source) -> None:
    """Reject a number of classes that the weights do not have: the head would be random.

    Raises:
        CheckpointError: the numbers of classes differ.
    """
    requested = source.model_args.get("num_classes")
    available = source.pretrained_cfg.get("num_classes") or timm.models.get_pretrained_cfg_value(
        source.architecture, "num_classes"
    )
    if requested and available and requested != available:
        raise CheckpointError(
            f"--model-arg num_classes={requested}: the weights of {source.name} have {available} classes, so the "
            "head would be random.",
            hint="Train a head first and give the result with --checkpoint.",
        )
