"""Can a config.json mean what it says?  Sizes that no model has would take for ever, or all memory, to build."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitcompress.errors import ModelError

_MOST_NUMBER = 1 << 16  # of channels, pixels, tokens
_MOST_NUMBERS = {"num_classes": 1 << 20, "depth": 512, "depths": 512, "num_hidden_layers": 512}
_SIZES = (  # of transformers, none of which is zero
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
    "num_channels", "embed_dim", "depths", "num_heads", "window_size",
)  # fmt: skip
_OTHERS = ("patch_size", "mlp_ratio", "num_register_tokens", "layer_norm_eps", "layerscale_value")


def check_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
    """Make sure that a config of transformers can be followed.

    Raises:
        ModelError: naming the first field that cannot.
    """
    for name in (*_SIZES, *_OTHERS):
        if name in config:
            _check(name, config[name], least=1 if name in _SIZES else 0)
    _check_statistics(preprocessor, "image_mean", "image_std")


def check_timm(model_args: Any, pretrained_cfg: Any) -> None:
    """Make sure that a config of timm's can be followed.

    Raises:
        ModelError: naming the first field that cannot.
    """
    for name, value in (("model_args", model_args), ("pretrained_cfg", pretrained_cfg)):
        if not isinstance(value, Mapping):
            raise ModelError(f"its {name} are no JSON object.")
    for name, value in model_args.items():
        _check(name, value, least=-_MOST_NUMBER, numbers=name == "norm_eps")
    size = pretrained_cfg.get("input_size")
    if size is not None:
        _check("input_size", size, least=1)
        if not isinstance(size, (list, tuple)) or len(size) != 3:
            raise ModelError("its input_size is not of three numbers.")
    _check_statistics(pretrained_cfg, "mean", "std")


def _check(name: str, value: Any, *, least: int, numbers: bool = True) -> None:
    """Hold the numbers in a value against bounds; where there have to be some, nothing else may be there."""
    most = _MOST_NUMBERS.get(name, _MOST_NUMBER)
    found = list(_leaves(value))
    for each in found:
        is_number = isinstance(each, (int, float)) and not isinstance(each, bool)
        if (is_number and not least <= each <= most) or (numbers and not is_number):
            raise ModelError(f"its {name} cannot be {str(each)[:40]}.")
    if name in ("depth", "depths") and sum(each for each in found if isinstance(each, (int, float))) > most:
        raise ModelError(f"its {name} are more than {most}.")


def _check_statistics(config: Mapping[str, Any], mean: str, std: str) -> None:
    for name in (mean, std):
        value = config.get(name)
        if value is None:
            continue
        numbers: list[Any] = list(value) if isinstance(value, (list, tuple)) else [None]
        good = all(type(each) in (int, float) and math.isfinite(each) and abs(each) <= 1e6 for each in numbers)
        if not numbers or not good or (name == std and min(numbers) < 1e-6):
            raise ModelError(f"its {name} is not of numbers that could be one.")


def _leaves(value: Any) -> Iterable[Any]:
    """What is in a value and in lists of it."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
