"""Find and print what differs between two files: plan, recipe, numbers and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from vitcompress.report.model import Result, to_json
from vitcompress.report.sharing import describe_layers, describe_sharing, shared_names
from vitcompress.report.terminal import print_lines, print_table

_NOT_NUMBERS = (
    "schema_version", "groups", "made_of", "transforms", "versions", "command", "notes", "why", "lineage",
    "preprocessing", "outputs",
)  # fmt: skip
_LONG_LISTS = ("loss_curve", "classes", "confusions", "fits")  # do not fit into a cell
_MAX_NUMBER = 10**18  # recipes in a file are not checked and may hold any number


class Difference(NamedTuple):
    """A field that differs between two files.

    Attributes:
        part: `plan`, `recipe`, `numbers` or `made with`.
        name: name of the field.
        first: value in the first file; None if it has none.
        second: value in the second file; None if it has none.
    """

    part: str
    name: str
    first: Any
    second: Any


def differences(first: Result, second: Result) -> list[Difference]:
    """Return what changed from one file to another; empty if nothing did.

    Args:
        first: usually the older file.
        second: usually the newer file.
    """
    rows: list[Difference] = []
    for part, fields_of in (
        ("plan", _plan_fields), ("recipe", _recipe_fields), ("numbers", _number_fields), ("made with", _version_fields)
    ):  # fmt: skip
        old, new = fields_of(first), fields_of(second)
        names = dict.fromkeys((*old, *new))
        rows += [Difference(part, n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)]
    return rows


def print_differences(rows: Sequence[Difference], names: tuple[str, str], console: Console) -> None:
    """Print the differences between two files, a table for each part.

    Args:
        rows: from `differences`.
        names: names of the two files.
        console: console to print on.
    """
    rows = _merge(rows)
    for part in dict.fromkeys(row.part for row in rows):
        cells = [
            (row.name, _show(row.first), _show(row.second), _show_change(row.first, row.second))
            for row in rows
            if row.part == part
        ]
        print_table([part, *names, "change"], cells, console)
    if not rows:
        print_lines(["The two files have the same plan, recipe, numbers and versions."], console)


def _plan_fields(result: Result) -> dict[str, Any]:
    report = result.report
    fields: dict[str, Any] = {"model": report.model, "sharing": describe_sharing(report.groups, report.made_of)}
    if report.outputs:
        fields["outputs"] = report.outputs
    fields["transforms"] = ", ".join(report.transforms) or "none"
    fields["preprocessing"] = report.preprocessing or "not known"
    for group in report.made_of:
        shared = f"share {', '.join(shared_names(group))}" if len(group.blocks) > 1 else ""
        count = f"{len(group.blocks)} blocks" if len(group.blocks) > 1 else "one block"
        details = "; ".join(filter(None, (shared, describe_layers(group))))
        fields[f"group of {group.donor}"] = f"{count}: {details or 'unchanged'}"
    return fields


def _recipe_fields(result: Result) -> dict[str, Any]:
    return {name: value for name, value in _flatten(result.recipe).items() if value is not None}


def _number_fields(result: Result) -> dict[str, Any]:
    tree = {name: value for name, value in to_json(result.report).items() if name not in _NOT_NUMBERS}
    tree["baselines"] = {row["name"]: row for row in tree["baselines"]}
    return {"file_bytes": result.file_bytes, **_flatten(tree)}


def _version_fields(result: Result) -> dict[str, Any]:
    return {**result.report.versions, "command": result.report.command}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a": {"b": 1}}` as `{"a.b": 1}`, without long lists."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            fields |= _flatten(value, f"{prefix}{name}.")
        elif name not in _LONG_LISTS:
            fields[f"{prefix}{name}"] = value
    return fields


def _merge(rows: Sequence[Difference]) -> list[Difference]:
    """Merge groups with the same change, and all baselines if only one file has any."""
    merged: list[Difference] = []
    baselines = [row for row in rows if row.name.partition(".")[0] == "baselines"]
    measured = [any(row[side] for row in baselines) for side in (2, 3)]
    for row in rows:
        last = merged[-1] if merged else None
        if row in baselines and not all(measured):
            if row is baselines[0]:
                words = ("measured" if side else "not measured" for side in measured)
                merged.append(Difference(row.part, "baselines", *words))
        elif last and row.name.startswith("group of ") and last[2:] == row[2:] and last.name.startswith("group"):
            names = last.name.partition(" of ")[2]
            merged[-1] = last._replace(name=f"groups of {names}, {row.name.removeprefix('group of ')}")
        else:
            merged.append(row)
    return merged


def _show(value: Any) -> str:
    """Format a value of a report or a recipe in one line; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_show, value)) if isinstance(value, (list, tuple)) else str(value)


def _show_change(first: Any, second: Any) -> str:
    """Format the change of a number; empty unless both values are numbers of a plausible size."""
    numbers = [value for value in (first, second) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < 2 or max(map(abs, numbers)) > _MAX_NUMBER:
        return ""
    change = second - first
    return f"{change:+,}" if isinstance(change, int) else f"{change:+.4g}"
