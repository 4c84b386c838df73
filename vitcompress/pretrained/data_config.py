"""Determine a model's data config: input size, mean, std, interpolation and crop.

What decides each field: the recipe's option, then the model's own config, then timm's default. The
size is always the one that the model was built for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm.data
from torch import nn

from vitcompress.data.preprocessing import CROP_MODES, INTERPOLATIONS
from vitcompress.errors import RecipeError
from vitcompress.pretrained.resolve import Source
from vitcompress.pretrained.transformers_config import is_transformers_folder
from vitcompress.recipe import ModelRecipe

_OPTIONS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
_TRANSFORMERS_NAMES = {"mean": "image_mean", "std": "image_std", "interpolation": "resample"}
_MIN_CROP_PCT, _MAX_CROP_PCT = 0.1, 10  # as in an artifact


def data_config(model: nn.Module, recipe: ModelRecipe) -> dict[str, Any]:
    """Return timm's data config of `model`: input size, mean, std, interpolation and crop.

    Args:
        model: a timm model, on any device.
        recipe: its mean, std, interpolation, crop_pct and crop_mode override the model's where they
            are set.

    Raises:
        RecipeError: mean or std have another number of channels than the model or are not on the
            scale 0–1, or another field has a value that timm does not know.
    """
    given = {name: value for name in _OPTIONS if (value := getattr(recipe, name)) is not None}
    config: dict[str, Any] = {**timm.data.resolve_model_data_config(model), **given}
    config["input_size"] = model_input_size(model, config["input_size"])
    channels = config["input_size"][0]
    for name in ("mean", "std"):
        config[name] = _per_channel(config[name], channels, _named(name, given, recipe), averaged=name not in given)
    _check_choices(config, given, recipe)
    _check_scale(config, given, recipe)
    return config


def preprocessing_notes(source: Source, model: nn.Module, recipe: ModelRecipe) -> tuple[str, ...]:
    """Return what a user should know about the preprocessing, beside the data config.

    Args:
        source: the model's name and config.
        model: the model, on any device.
        recipe: the recipe that names it.
    """
    return (*source.notes, *_size_notes(model, recipe), *_checkpoint_notes(recipe.checkpoint))


def _size_notes(model: nn.Module, recipe: ModelRecipe) -> tuple[str, ...]:
    """Return a note where a model is built for images of another size than its config names."""
    named = timm.data.resolve_model_data_config(model)["input_size"]
    built = model_input_size(model, named)
    if tuple(named[1:]) == tuple(built[1:]) or "img_size" in recipe.model_arg:
        return ()
    way = f"img_size={named[1]}" if named[1] == named[2] else f"img_size=[{named[1]},{named[2]}]"
    return (
        f"The config of {recipe.model} names images of {named[1]} x {named[2]} px, but the model is built for "
        f"{built[1]} x {built[2]} px, so images get that size. For the size in the config, give --model-arg {way}.",
    )


def _checkpoint_notes(checkpoint: Path | None) -> tuple[str, ...]:
    """Return a note where the folder of the weights names a preprocessing that is not read."""
    if checkpoint is None or not checkpoint.is_file():
        return ()
    found = [name for name in ("preprocessor_config.json", "config.json") if (checkpoint.parent / name).is_file()]
    if not found:
        return ()
    return (
        f"{found[0]} beside --checkpoint {checkpoint.name} is not read; to take the preprocessing from it, name the "
        f"folder: local-dir:{checkpoint.parent}.",
    )


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


def _named(name: str, given: Mapping[str, Any], recipe: ModelRecipe) -> str:
    """Return how to call a field in a message: its flag, or its name in the model's config."""
    if name in given:
        return f"--{name.replace('_', '-')}"
    in_folder = recipe.checkpoint is not None and recipe.checkpoint.is_dir()
    folder = recipe.checkpoint if in_folder else Path(recipe.model.removeprefix("local-dir:"))
    is_transformers = folder is not None and is_transformers_folder(folder)
    return f"{recipe.model}: {_TRANSFORMERS_NAMES.get(name, name) if is_transformers else name} in its config"


def _per_channel(values: Sequence[float], channels: int, where: str, *, averaged: bool) -> tuple[float, ...]:
    """Return a value for each channel; one value is repeated.

    Args:
        values: one value, or one per channel.
        channels: number of the model's channels.
        where: flag or field, for messages.
        averaged: whether values of red, green and blue are averaged for other channels, as for a
            gray model with timm's config.

    Raises:
        RecipeError: there is another number of values.
    """
    if len(values) == 1 or (averaged and len(values) == 3 != channels):
        return (sum(values) / len(values),) * channels
    if len(values) != channels:
        raise RecipeError(f"{where} has {len(values)} values; the model has {channels} channels.")
    return tuple(values)


def _check_choices(config: Mapping[str, Any], given: Mapping[str, Any], recipe: ModelRecipe) -> None:
    """Check interpolation, crop_mode and crop_pct.

    Raises:
        RecipeError: timm knows no such value for evaluation.
    """
    for name, choices in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if config[name] not in choices:
            raise RecipeError(
                f"{_named(name, given, recipe)} is {str(config[name])[:40]!r}, which evaluation cannot use.",
                hint=f"Give --{name.replace('_', '-')} {'|'.join(choices)}.",
            )
    value = config["crop_pct"]
    if type(value) not in (int, float) or not _MIN_CROP_PCT <= value <= _MAX_CROP_PCT:
        raise RecipeError(
            f"{_named('crop_pct', given, recipe)} is {str(value)[:40]}, no fraction of the resized image.",
            hint="Give --crop-pct with a fraction like 0.875.",
        )


def _check_scale(config: Mapping[str, Any], given: Mapping[str, Any], recipe: ModelRecipe) -> None:
    """Check that mean and standard deviation are those of pixels on the scale 0–1.

    Raises:
        RecipeError: they are not; the hint names the values on that scale.
    """
    mean, std = config["mean"], config["std"]
    wrong = {
        "mean": not all(math.isfinite(value) and 0 <= value <= 1 for value in mean),
        "std": not all(math.isfinite(value) and 0 < value <= 1 for value in std),
    }
    if not any(wrong.values()):
        return
    faults = [f"{_named(name, given, recipe)} is {_show(config[name])}" for name, is_wrong in wrong.items() if is_wrong]
    raise RecipeError(f"{'; '.join(faults)}: images have values from 0 to 1 here.", hint=_hint(mean, std))


def _hint(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """Return what to give instead: the values divided by 255, if they are on the scale 0–255."""
    in_bytes = max(mean) > 2 or max(std) > 2  # no statistics of bytes are that small
    # beside means of 0–255, a deviation of 1 is on that scale too, and a smaller one on 0–1
    means = tuple(value / 255 for value in mean) if max(mean) > 1 else mean
    deviations = tuple(value / 255 for value in std) if max(std) > 1 or (max(mean) > 1 and min(std) == 1) else std
    usable = all(0 <= value <= 1 for value in means) and all(0 < value <= 1 for value in deviations)
    if not (in_bytes and usable):
        return "Give means from 0 to 1 and standard deviations above 0, at most 1, like --mean 0.5 --std 0.5."
    return f"They look like values on the scale 0–255. Divided by 255: --mean {_show(means)} --std {_show(deviations)}."


def _show(values: Sequence[float]) -> str:
    return ",".join(f"{value:.6g}" for value in values)
