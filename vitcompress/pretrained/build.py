"""Build a model without its pretrained weights, on the meta device or with random weights."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, split_model_name_tag
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitcompress.errors import ModelError, first_line, shorten
from vitcompress.families.outputs import tell_outputs
from vitcompress.pretrained.resolve import Source

# arguments that timm reads itself instead of passing them to the model's constructor; they could
# make it read files, use the network or build another model
_TIMM_ARGS = frozenset(
    {"device", "dtype", "features_only", "feature_cls", "model_name", "out_indices", "pruned", "use_naflex", "variant"}
    | inspect.signature(timm.create_model).parameters.keys()
    | inspect.signature(build_model_with_cfg).parameters.keys()
) - {"kwargs"}
_WEIGHT_LOCATIONS = frozenset({"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"})


def empty_model(source: Source) -> nn.Module:
    """Build the model of `source` on the meta device, its buffers too; reads no weights.

    Raises:
        ModelError: timm cannot build it with these arguments.
    """
    with torch.device("meta"), _SkipInitialization():
        return build_model(source)


class _SkipInitialization(TorchFunctionMode):
    """Skip filling meta tensors, which takes three quarters of the time to build a model."""

    _FILLS = frozenset(
        getattr(Tensor, name)
        for name in ("add_", "clamp_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_model(source: Source) -> nn.Module:
    """Build the model of `source` with random weights.

    Raises:
        ModelError: timm cannot build it with these arguments, or its outputs are of another kind.
    """
    cfg = {k: v for k, v in source.pretrained_cfg.items() if k not in _WEIGHT_LOCATIONS}
    name, _ = split_model_name_tag(source.architecture)
    if not timm.is_model(name):
        raise ModelError(f"{source.architecture!r} is not one of timm's architectures.")
    reserved = sorted(_TIMM_ARGS & source.model_args.keys())
    if reserved:
        raise ModelError(
            f"--model-arg {shorten(reserved)}: timm does not pass it to the model's constructor.", hint="Leave it out."
        )
    model_args = dict(source.model_args)
    norm_eps = model_args.pop("norm_eps", None)  # not an argument of timm's constructors; set below
    try:
        model: nn.Module = timm.create_model(
            name if cfg else source.architecture, pretrained=False, pretrained_cfg=cfg or None, **model_args
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
        args = " ".join(f"{key}={value}" for key, value in source.model_args.items()) or "its default arguments"
        raise ModelError(
            f"timm cannot build {source.architecture} with {args}: {first_line(error).rstrip('.')}.",
            hint="Check --model-arg against the model's constructor in timm.",
        ) from error
    if norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(norm_eps)
    tell_outputs(model, source.outputs, name=source.name)
    return model
