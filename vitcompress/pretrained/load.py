"""Load a pretrained model: build it and fill every tensor with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import timm.data
import torch
from torch import Tensor, nn

from vitcompress.errors import CheckpointError, first_line, shorten
from vitcompress.families.registry import family_of
from vitcompress.pretrained.build import build_model, empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.pretrained.transformers_weights import has_transformers_names, to_timm_weights
from vitcompress.pretrained.weights_file import read_weights, unreadable_error
from vitcompress.runtime.caches import cache_hint

_MIN_CHECKED_NUMBERS = 1 << 28  # a gigabyte; for smaller models, all tensors that do not fit are listed
_FIT_HINT = "Name the model that the weights belong to, or set its sizes with --model-arg key=value."


def load_pretrained(source: Source) -> nn.Module:
    """Return the model of `source` with its weights, in float32, on CPU, in eval mode.

    Raises:
        ModelError: timm cannot build it.
        CheckpointError: the weights are missing, unreadable, not finite or of another model.
    """
    if source.checkpoint is not None:
        _check_file_size(source.checkpoint, source)
        model = build_model(source)
        _fill_from_checkpoint(model, source.checkpoint)
    else:
        model = _load_with_timm(source)
    not_finite = [name for name, t in model.state_dict().items() if not bool(torch.isfinite(t.float()).all())]
    if not_finite:
        raise CheckpointError(
            f"The weights of {source.checkpoint or source.name} are not finite: {shorten(not_finite, limit=3)}.",
            hint="The training run diverged: use an earlier checkpoint.",
        )
    return model.float().eval()


def _check_file_size(checkpoint: Path, source: Source) -> None:
    """Reject a file that is too small for the model before memory for the model is allocated.

    Raises:
        CheckpointError: the file is too small.
    """
    if not checkpoint.is_file():
        return  # reading it reports what is wrong
    numbers = sum(t.numel() for t in empty_model(source).state_dict().values())
    if numbers > 4 * checkpoint.stat().st_size + _MIN_CHECKED_NUMBERS:  # at least a byte each; some may be tied
        raise CheckpointError(
            f"--checkpoint {checkpoint} does not fit the model: it has {checkpoint.stat().st_size:,} bytes, but "
            f"{source.name} has {numbers:,} numbers.",
            hint=_FIT_HINT,
        )


def _load_with_timm(source: Source) -> nn.Module:
    """Let timm build the model and load its weights from its cache, the Hub or a folder.

    Raises:
        CheckpointError: timm cannot load the weights, or they have another number of classes.
    """
    remote = source.name.partition(":")[0] in ("hf-hub", "local-dir")
    _check_head(source)
    name = source.name if remote else source.architecture
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **source.model_args)
    except Exception as error:  # the Hub client raises dozens of types from three libraries
        if source.name.startswith("local-dir:"):
            raise unreadable_error(f"MODEL {source.name}", error) from error
        raise CheckpointError(
            f"Cannot load the weights of {source.name}: {first_line(error).rstrip('.')}.",
            hint=cache_hint(error) or "Without a network, give a local file with --checkpoint FILE.",
        ) from error
    return model


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


def _fill_from_checkpoint(model: nn.Module, path: Path) -> None:
    """Load the weights in `path` into `model`, in place.

    Names of transformers and of the other publishers that timm knows are translated.

    Raises:
        CheckpointError: the file is unreadable, or its tensors are not those of the model.
    """
    weights = read_weights(path)
    if has_transformers_names(weights):
        weights = to_timm_weights(weights, headless=getattr(model, "num_classes", None) == 0)
    faults = _mismatches(model, weights)
    if faults:
        try:
            converted = family_of(model, path.name).convert(dict(weights), model)
        except Exception:  # the names in the file are then the ones to report
            converted = {}
        if not converted or _mismatches(model, converted):
            raise CheckpointError(
                f"--checkpoint {path} does not fit the model:\n" + "\n".join(f"  {fault}" for fault in faults),
                hint=_compare_widths(model, weights) + _FIT_HINT,
            )
        weights = converted
    model.load_state_dict(weights)


def _mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """List missing and unexpected tensors and wrong shapes, of each kind the first and the last."""
    expected = model.state_dict()
    missing = [f"missing: {name} {tuple(t.shape)}" for name, t in expected.items() if name not in weights]
    unexpected = [f"unexpected: {name} {tuple(t.shape)}" for name, t in weights.items() if name not in expected]
    shapes = [
        f"shape: {name} is {tuple(t.shape)}, the model has {tuple(expected[name].shape)}"
        for name, t in weights.items()
        if name in expected and t.shape != expected[name].shape
    ]
    return [line for faults in (missing, unexpected, shapes) for line in _first_and_last(faults)]


def _first_and_last(faults: list[str]) -> list[str]:
    """Return the first fault, with the number of those left out after it, and the last."""
    num_more = len(faults) - 2
    return faults if num_more <= 0 else [f"{faults[0]} … ({num_more} more)", faults[-1]]


def _compare_widths(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Say how wide weights and model are, by the first norm that differs; empty if none does."""
    for name, t in model.state_dict().items():
        if name.endswith(("norm1.weight", "norm.weight")) and name in weights and t.shape != weights[name].shape:
            return f"The weights are {weights[name].numel()} wide, the model {t.numel()}. "
    return ""
