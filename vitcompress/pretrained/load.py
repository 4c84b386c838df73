"""Build a pretrained model and fill it with its weights, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import timm.data
import torch
from torch import Tensor, nn

from vitcompress.errors import CheckpointError, first_line, shorten
from vitcompress.families.find import family_of
from vitcompress.pretrained.build import build_model, empty_model
from vitcompress.pretrained.resolve import Source
from vitcompress.pretrained.transformers_weights import has_transformers_names, to_timm_weights
from vitcompress.pretrained.weights_file import read_weights, unreadable

_FEW_NUMBERS = 1 << 28  # a gigabyte, so that smaller models are told tensor by tensor what does not fit


def load_teacher(source: Source) -> nn.Module:
    """Build the model of `source` with its weights, on CPU, in eval mode.

    Raises:
        ModelError: timm cannot build it.
        CheckpointError: the weights are missing, unreadable, not finite or of another model; every wrong key at once.
    """
    if source.checkpoint is not None:
        _check_holds(source.checkpoint, source)
        model = build_model(source)
        _fill_from_checkpoint(model, source.checkpoint)
    else:
        model = _fetch(source)
    broken = [name for name, t in model.state_dict().items() if not bool(torch.isfinite(t.float()).all())]
    if broken:
        raise CheckpointError(
            f"The weights of {source.checkpoint or source.name} are not finite: {shorten(broken, limit=3)}.",
            hint="The run that made them blew up: take an earlier checkpoint of it.",
        )
    return model.float().eval()


def _check_holds(checkpoint: Path, source: Source) -> None:
    """Refuse a file that is too small for the model, before there is memory for the model's weights.

    Raises:
        CheckpointError: it is.
    """
    if not checkpoint.is_file():
        return  # reading it says what is wrong
    numbers = sum(t.numel() for t in empty_model(source).state_dict().values())
    if numbers > 4 * checkpoint.stat().st_size + _FEW_NUMBERS:  # each takes a byte at least; some may be tied
        raise CheckpointError(
            f"--checkpoint {checkpoint} does not fit the model: it has {checkpoint.stat().st_size:,} bytes, and "
            f"{source.name} {numbers:,} numbers.",
            hint="Give the model the weights were made for, or its sizes with --model-arg key=value.",
        )


def _fetch(source: Source) -> nn.Module:
    """Let timm find the weights: its cache, the Hub or a folder."""
    remote = source.name.partition(":")[0] in ("hf-hub", "local-dir")
    _check_head(source)
    name = source.name if remote else source.architecture
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **source.model_args)
    except Exception as error:  # the Hub client raises dozens of types, of three libraries
        if source.name.startswith("local-dir:"):
            raise unreadable(f"MODEL {source.name}", error) from error
        raise CheckpointError(
            f"No weights for {source.name}: {first_line(error).rstrip('.')}.",
            hint="Without a network, give a local file: --checkpoint FILE.",
        ) from error
    return model


def _check_head(source: Source) -> None:
    """Refuse another number of classes than the weights have: timm would start that head at random."""
    wanted = source.model_args.get("num_classes")
    stored = source.pretrained_cfg.get("num_classes") or timm.models.get_pretrained_cfg_value(
        source.architecture, "num_classes"
    )
    if wanted and stored and wanted != stored:
        raise CheckpointError(
            f"--model-arg num_classes={wanted}: the weights of {source.name} have {stored} classes, so the head "
            "would be random.",
            hint="Train the head first and give the result with --checkpoint.",
        )


def _fill_from_checkpoint(model: nn.Module, path: Path) -> None:
    """Load `path` into `model`, in place; names of transformers and other publishers are translated."""
    weights = read_weights(path)
    if has_transformers_names(weights):
        weights = to_timm_weights(weights, headless=getattr(model, "num_classes", None) == 0)
    faults = _mismatches(model, weights)
    if faults:
        try:
            converted = family_of(model, path.name).convert(dict(weights), model)
        except Exception:  # a translation that fails is none: the names as they stand are what to report
            converted = {}
        if not converted or _mismatches(model, converted):
            raise CheckpointError(
                f"--checkpoint {path} does not fit the model:\n" + "\n".join(f"  {fault}" for fault in faults),
                hint=f"{_widths(model, weights)}Give the model the weights were made for, or its sizes with "
                "--model-arg key=value.",
            )
        weights = converted
    model.load_state_dict(weights)


def _mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The names and shapes by which `weights` differs from what `model` holds: of each kind the first and the last."""
    expected = model.state_dict()
    missing = [f"missing: {name} {tuple(t.shape)}" for name, t in expected.items() if name not in weights]
    unexpected = [f"unexpected: {name} {tuple(t.shape)}" for name, t in weights.items() if name not in expected]
    shapes = [
        f"shape: {name} is {tuple(t.shape)}, the model has {tuple(expected[name].shape)}"
        for name, t in weights.items()
        if name in expected and t.shape != expected[name].shape
    ]
    return [line for kind in (missing, unexpected, shapes) for line in _ends(kind)]


def _ends(faults: list[str]) -> list[str]:
    """The first and the last, and a count of what is between."""
    more = len(faults) - 2
    return faults if more <= 0 else [f"{faults[0]} … ({more} more)", faults[-1]]


def _widths(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """How wide the weights and the model are, by the first norm that both have; empty where that is the same."""
    for name, t in model.state_dict().items():
        if name.endswith(("norm1.weight", "norm.weight")) and name in weights and t.shape != weights[name].shape:
            return f"The weights are {weights[name].numel()} wide, the model {t.numel()}. "
    return ""
