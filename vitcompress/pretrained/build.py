"""Build the model that a name stands for, without its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import timm
import timm.data
import torch
from timm.models import build_model_with_cfg, split_model_name_tag
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitcompress.errors import ModelError, first_line, shorten
from vitcompress.pretrained.resolve import Source

# what timm takes for itself, before the model's constructor: leave to read files or the network, or to build another
_NOT_FOR_CONSTRUCTOR = frozenset(
    {"device", "dtype", "features_only", "feature_cls", "model_name", "out_indices", "pruned", "use_naflex", "variant"}
    | inspect.signature(timm.create_model).parameters.keys()
    | inspect.signature(build_model_with_cfg).parameters.keys()
) - {"kwargs"}
_PLACES = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"})


def empty_model(source: Source) -> nn.Module:
    """Build the model of `source` on the meta device, its buffers too; reads no weights.

    Raises:
        ModelError: timm cannot build it with these arguments.
    """
    with torch.device("meta"), _Unfilled():
        return build_model(source)


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills tensors that have no numbers: three quarters of the time it takes to build a model."""

    _FILLS = frozenset(
        getattr(Tensor, name)
        for name in ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_model(source: Source) -> nn.Module:
    """Build the model of `source` with the weights it starts from at random.

    Raises:
        ModelError: timm cannot build it with these arguments.
    """
    return _create(source.architecture, source.model_args, source.pretrained_cfg)


def _create(architecture: str, model_args: Mapping[str, Any], cfg: Mapping[str, Any]) -> nn.Module:
    known = {k: v for k, v in cfg.items() if k not in _PLACES}
    name, _ = split_model_name_tag(architecture)
    if not timm.is_model(name):
        raise ModelError(f"{architecture!r} is not one of timm's architectures.")
    reserved = sorted(_NOT_FOR_CONSTRUCTOR & model_args.keys())
    if reserved:
        message = f"--model-arg {shorten(reserved)}: is for timm itself, and not for the model's constructor."
        raise ModelError(message, hint="Leave it out.")
    arguments = dict(model_args)
    norm_eps = arguments.pop("norm_eps", None)  # ours, for checkpoints made with another: timm's constructors have none
    try:
        model: nn.Module = timm.create_model(
            name if known else architecture, pretrained=False, pretrained_cfg=known or None, **arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
        given = " ".join(f"{key}={value}" for key, value in model_args.items())
        raise ModelError(
            f"timm cannot build {architecture} with {given or 'its defaults'}: {first_line(error).rstrip('.')}.",
            hint="Check --model-arg against the model's constructor in timm.",
        ) from error
    for norm in model.modules() if norm_eps is not None else ():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = float(norm_eps)
    return model
