"""Determine a model's data config: input size, mean, std, interpolation and crop."""

from __future__ import annotations

from typing import Any

import timm.data
from torch import nn

from vitcompress.errors import RecipeError
from vitcompress.recipe import ModelRecipe


def data_config(model: nn.Module, recipe: ModelRecipe) -> dict[str, Any]:
    """Return timm's data config of `model`: input size, mean, std, interpolation and crop.

    Args:
        model: a timm model, on any device.
        recipe: its mean, std, interpolation and crop_pct override timm's where they are set.

    Raises:
        RecipeError: --mean or --std has a different number of channels than the model.
    """
    overrides = {
        name: value
        for name in ("mean", "std", "interpolation", "crop_pct")
        if (value := getattr(recipe, name)) is not None
    }
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    config["input_size"] = model_input_size(model, config["input_size"])
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        values = tuple(overrides.get(name, config[name]))
        if len(values) == 1 or (name not in overrides and len(values) != channels):
            values = (sum(values) / len(values),) * channels  # a gray model with an RGB config
        if len(values) != channels:
            raise RecipeError(f"--{name} has {len(values)} values; the model has {channels} channels.")
        overrides[name] = values
    return {**config, **overrides}


def model_input_size(model: nn.Module, fallback: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the channels, rows and columns that `model` was built for.

    Args:
        model: a timm model, on any device.
        fallback: channels, rows and columns to return where the model does not hold them.
    """
    embed = getattr(model, "patch_embed", None)
    projection = getattr(embed, "proj", None)
    channels = projection.in_channels if isinstance(projection, nn.Conv2d) else fallback[0]
    size = getattr(embed, "img_size", None)
    rows, columns = size if size is not None else fallback[1:]
    return channels, rows, columns
