"""Declare options, and parse their values (lists, pairs, sizes) from flags and from YAML alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BeforeValidator, ConfigDict, Field

_MIN_BYTES = 1000
_FLAGS = {"model": "MODEL", "matrices": "--no-matrices"}
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


def option(default: Any, description: str, **bounds: Any) -> Any:
    """Return a field of a recipe: its default, its help text, and pydantic's bounds."""
    return Field(default, description=description, **bounds)


def flag_of(name: str) -> str:
    """Return the flag of a recipe's field; negated, if the field is on by default."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _words(value: Any) -> Any:
    """Read `a,b` or `none` as a tuple of words."""
    if isinstance(value, str):
        return () if value.strip() in ("", "none") else tuple(word.strip() for word in value.split(","))
    return value


def _mapping(value: Any) -> Any:
    """Read `key=value` strings as a mapping; values are YAML (`16`, `[14, 14]`) or `14,14`."""
    if not isinstance(value, (list, tuple)):
        return value
    pairs = {}
    for item in value:
        key, equals, text = str(item).partition("=")
        if not equals or not key:
            raise ValueError(f"{item!r} is not of the form key=value")
        try:
            pairs[key.strip().replace("-", "_")] = _numbers(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"{item!r}: {text!r} cannot be read as YAML") from error
    return pairs


def _numbers(value: Any) -> Any:
    """Read `32,64` or `(32, 64)` as a list of numbers; other values stay as they are."""
    if not isinstance(value, str) or "," not in value:
        return value
    match = re.fullmatch(r"\((.*)\)|([^()]*)", value.strip())
    words = [word.strip() for word in (match[1] or match[2] or "").rstrip(", ").split(",")] if match else []
    numbers = [yaml.safe_load(word) if word else None for word in words]
    return numbers if all(isinstance(number, (int, float)) for number in numbers) and numbers else value


def _bytes(value: Any) -> Any:
    """Read `40MB` (10⁶), `40MiB` (2²⁰) or a plain number of bytes as an integer."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(i?)B?\s*", value)
    if match is None:
        raise ValueError(f"{value!r} is not a size like 40MB or 38MiB")
    power = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3}[match[2]]
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if 0 < size < _MIN_BYTES:
        raise ValueError(f"{value.strip()} is {size} bytes, smaller than any model (did you mean {match[1]}MB?)")
    return size


def _text(value: Any) -> Any:
    """Read a path as text: images are named by a path, or by more than a path."""
    return str(value) if isinstance(value, Path) else value


def _workers(value: Any) -> Any:
    """Read a number or `auto`; None means `auto`."""
    if value is None or value == "auto":
        return "auto"
    if not isinstance(value, bool) and str(value).strip().isdecimal():
        return int(value)
    raise ValueError(f"{value!r} is not a number of processes or auto")


AnyPath = BeforeValidator(_text)
Workers = BeforeValidator(_workers)
Words = BeforeValidator(_words)
Pairs = BeforeValidator(_mapping)
Bytes = BeforeValidator(_bytes)
