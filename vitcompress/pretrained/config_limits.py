"""Reject a config.json with implausible sizes, which could take forever or all memory to build."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitcompress.errors import ModelError

_MAX_SIZE = 1 << 16  # of channels, pixels, tokens
_MAX_SIZES = {"num_classes": 1 << 20, "depth": 512, "depths": 512, "num_hidden_layers": 512}
_POSITIVE_FIELDS = (  # of transformers' configs
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "num_channels", "embed_dim", "depths", "num_heads", "window_size",
)  # fmt: skip
_NONNEGATIVE_FIELDS = ("patch_size", "mlp_ratio", "num_register_tokens", "layer_norm_eps", "layerscale_value")


def check_transformers(config: Mapping[str, Any]) -> None:
    """Check the sizes in transformers' config.

    Args:
        config: content of config.json.

    Raises:
        ModelError: names the first implausible field.
    """
    for name in (*_POSITIVE_FIELDS, *_NONNEGATIVE_FIELDS):
        if name in config:
            _check_numbers(name, config[name], minimum=1 if name in _POSITIVE_FIELDS else 0)


def check_timm(model_args: Any, pretrained_cfg: Any) -> None:
    """Check the types, sizes and statistics in timm's config.

    Args:
        model_args: `model_args` of config.json.
        pretrained_cfg: `pretrained_cfg` of config.json.

    Raises:
        ModelError: names the first implausible field.
    """
    for name, value in (("model_args", model_args), ("pretrained_cfg", pretrained_cfg)):
        if not isinstance(value, Mapping):
            raise ModelError(f"its {name} is not a JSON object.")
    for name, value in model_args.items():
        _check_numbers(name, value, minimum=-_MAX_SIZE, only_numbers=name == "norm_eps")
    size = pretrained_cfg.get("input_size")
    if size is not None:
        _check_numbers("input_size", size, minimum=1)
        if not isinstance(size, (list, tuple)) or len(size) != 3:
            raise ModelError("its input_size does not consist of three numbers.")
    crop_pct = pretrained_cfg.get("crop_pct")
    if crop_pct is not None and (type(crop_pct) not in (int, float) or not 0 < crop_pct <= _MAX_SIZE):
        raise ModelError(f"its crop_pct cannot be {str(crop_pct)[:40]}.")
    _check_statistics(pretrained_cfg, "mean", "std")


def _check_numbers(name: str, value: Any, *, minimum: int, only_numbers: bool = True) -> None:
    """Check that the numbers in a value, or in nested lists, are at least `minimum` and not huge.

    With `only_numbers`, nothing else is allowed.
    """
    maximum = _MAX_SIZES.get(name, _MAX_SIZE)
    leaves = list(_leaves(value))
    for leaf in leaves:
        is_number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
        if (is_number and not minimum <= leaf <= maximum) or (only_numbers and not is_number):
            raise ModelError(f"its {name} cannot be {str(leaf)[:40]}.")
    if name in ("depth", "depths") and sum(leaf for leaf in leaves if isinstance(leaf, (int, float))) > maximum:
        raise ModelError(f"its {name} add up to more than {maximum}.")


def _check_statistics(config: Mapping[str, Any], mean: str, std: str) -> None:
    """Check that `config[mean]` and `config[std]` are finite and that std is not near zero."""
    for name in (mean, std):
        value = config.get(name)
        if value is None:
            continue
        numbers: list[Any] = list(value) if isinstance(value, (list, tuple)) else [None]
        plausible = all(type(x) in (int, float) and math.isfinite(x) and abs(x) <= 1e6 for x in numbers)
        if not numbers or not plausible or (name == std and min(numbers) < 1e-6):
            kind = "standard deviation" if name == std else "mean"
            raise ModelError(f"its {name} is not a list of plausible numbers for a {kind} per channel.")


def _leaves(value: Any) -> Iterable[Any]:
    """Yield `value`, or the values in nested lists."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
