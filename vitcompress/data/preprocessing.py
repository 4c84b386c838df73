"""Describe how images become the input of a model, in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


def resized_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that timm resizes to before it crops."""
    rows, columns = (math.floor(side / config.get("crop_pct", 1.0)) for side in config["input_size"][1:])
    return rows, columns


def describe_preprocessing(config: Mapping[str, Any]) -> str:
    """Return a line on size, resizing, crop, interpolation, mean and standard deviation.

    Args:
        config: timm's data config; input size, mean and std at least.
    """
    channels, rows, columns = config["input_size"]
    shape = _size(rows, columns) + (" px (rows x columns)" if rows != columns else " px")
    gray = ", gray" if channels == 1 else ""
    mean, std = _numbers(config["mean"]), _numbers(config["std"])
    return f"{shape}{gray}, {_resizing(config)}; mean {mean}; deviation {std}"


def _resizing(config: Mapping[str, Any]) -> str:
    size, resized = tuple(config["input_size"][1:]), resized_size(config)
    how = f"({config.get('interpolation', 'bicubic')})"
    mode = config.get("crop_mode", "center")
    if mode == "squash":
        crop = "" if resized == size else ", center crop"
        return f"squash to {_size(*resized)} {how}{crop}"
    if mode == "border":
        crop = "" if resized == size else ", center crop"
        return f"resize to fit into {_size(*resized)} {how}, borders of the mean color{crop}"
    crop = "center crop" if resized[0] >= size[0] else "black borders"
    target = f"{resized[0]}" if resized[0] == resized[1] else f"cover {_size(*resized)}"
    return f"resize to {target} {how}, {crop}"


def _size(rows: int, columns: int) -> str:
    return f"{rows} x {columns}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
