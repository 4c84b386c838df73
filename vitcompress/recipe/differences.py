"""List how two mappings of facts differ, such as those of an interrupted run and of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitcompress.recipe.values import flag_of


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for every fact that differs, by its flag or name."""
    older, newer = _flatten(before), _flatten(now)
    return [
        f"  {name}: {_show(newer.get(name))}, was {_show(older.get(name))}"
        for name in sorted(older.keys() | newer.keys())
        if older.get(name) != newer.get(name)
    ]


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of facts, by flag or dotted name."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if name == "" and key == "recipe":  # stage → field → value
            for fields in value.values():
                leaves |= {flag_of(field): setting for field, setting in fields.items()}
        else:
            leaves |= _flatten(value, f"{name}.{key}" if name else key)
    return leaves


def _show(value: Any) -> str:
    return "not given" if value is None else str(value)
