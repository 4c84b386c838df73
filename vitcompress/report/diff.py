"""What is different about two results, and how do several stand beside each other?  Plan, recipe and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress.report.model import Report, to_json
from vitcompress.report.page import PAGES, Result, size_plot
from vitcompress.report.picture import Point, points_of
from vitcompress.report.private import shareable, without_places
from vitcompress.report.terminal import accuracy_rows, made_of, megabytes, sharing, size_rows, speed_rows

_NOT_NUMBERS = ("schema_version", "groups", "made_of", "transforms", "versions", "command", "notes", "why", "lineage")
_MOST_NUMBER = 10**18
_LISTS = ("loss_curve", "classes", "confusions")  # too long to be told in a line


class Difference(NamedTuple):
    """Something that two files do not have in common.

    Attributes:
        part: `plan`, `recipe`, `numbers` or `made with`.
        name: of the field.
        first: what the first file has; None where it has none.
        second: what the second has.
    """

    part: str
    name: str
    first: Any
    second: Any


def differences(first: Result, second: Result) -> list[Difference]:
    """What changed from one file to another; nothing where they are alike.

    Args:
        first: the older one, say.
        second: the newer one.
    """
    found: list[Difference] = []
    for part, tell in (("plan", _plan), ("recipe", _recipe), ("numbers", _numbers), ("made with", _made_with)):
        old, new = tell(first), tell(second)
        names = dict.fromkeys((*old, *new))
        found += [Difference(part, n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)]
    return found


def _plan(result: Result) -> dict[str, Any]:
    report = result.report
    told: dict[str, Any] = {"model": report.model, "sharing": sharing(report.groups, report.made_of)}
    told["transforms"] = ", ".join(report.transforms) or "none"
    for group in report.made_of:
        shared = ", ".join([*group.shared, *(f"{layer} (basis)" for layer in group.bases)])
        own = "; ".join(filter(None, (f"share {shared}" if len(group.blocks) > 1 else "", made_of(group))))
        count = f"{len(group.blocks)} blocks" if len(group.blocks) > 1 else "one block"
        told[f"group of {group.donor}"] = f"{count}: {own or 'as its source has it'}"
    return told


def _recipe(result: Result) -> dict[str, Any]:
    return {name: value for name, value in _leaves(result.recipe).items() if value is not None}


def _numbers(result: Result) -> dict[str, Any]:
    tree = {name: value for name, value in to_json(result.report).items() if name not in _NOT_NUMBERS}
    baselines = {row["name"]: row for row in tree.pop("baselines")}
    return {"file_bytes": result.file_bytes, **_leaves({**tree, "baselines": baselines})}


def _made_with(result: Result) -> dict[str, Any]:
    return {**result.report.versions, "command": result.report.command}


def _leaves(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{before}{name}.")
        elif name not in _LISTS:
            found[f"{before}{name}"] = value
    return found


def print_differences(found: Sequence[Difference], names: tuple[str, str], console: Console) -> None:
    """Print what two files do not have in common: a table for each part."""
    found = _gathered(found)
    for part in dict.fromkeys(row.part for row in found):
        table = Table(part, *(escape(name) for name in names), "change")
        for row in found:
            if row.part == part:
                cells = (row.name, shown(row.first), shown(row.second), change(row.first, row.second))
                table.add_row(*(escape(cell) for cell in cells))
        console.print(table)
    if not found:
        console.print("The two are alike: plan, recipe, numbers and versions.")


def _gathered(found: Sequence[Difference]) -> list[Difference]:
    """The same in fewer rows: groups that changed alike in one, and baselines that one file has not in another."""
    rows: list[Difference] = []
    baselines = [row for row in found if row.name.partition(".")[0] == "baselines"]
    lacking = [not any(row[side] for row in baselines) for side in (2, 3)]
    for row in found:
        last = rows[-1] if rows else None
        if row in baselines and any(lacking):
            if row is baselines[0]:
                said = ["not measured" if lacks else "measured" for lacks in lacking]
                rows.append(Difference(row.part, "baselines", *said))
        elif last and row.name.startswith("group of ") and last[2:] == row[2:] and last.name.startswith("group"):
            names = last.name.partition(" of ")[2]
            rows[-1] = last._replace(name=f"groups of {names}, {row.name.removeprefix('group of ')}")
        else:
            rows.append(row)
    return rows


def shown(value: Any) -> str:
    """A value of a report or a recipe in a line; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(shown, value)) if isinstance(value, (list, tuple)) else str(value)


def change(first: Any, second: Any) -> str:
    """By how much a number is larger or smaller; empty of anything else."""
    numbers = [value for value in (first, second) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < 2:
        return ""
    if max(map(abs, numbers)) > _MOST_NUMBER:  # of a recipe from a file, which can say anything
        return ""
    by = second - first
    return f"{by:+,}" if isinstance(by, int) else f"{by:+.4g}"


# --- several files


def compared_rows(results: Sequence[Result]) -> list[list[str]]:
    """What each file comes to: a row for every measure that one of them has, a column for each file."""
    columns = [_column(result) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "–") for column in columns)] for name in names]


def _column(result: Result) -> dict[str, str]:
    report = result.report
    found = {
        "source": report.model, "blocks": sharing(report.groups, report.made_of),
        "own in each block": ", ".join(report.transforms) or "–", "stored as": report.store,
        "file": megabytes(result.file_bytes),
    }  # fmt: skip
    for name, _, student, gained in size_rows(report.size):
        found[name] = f"{student} ({gained})" if gained else student
    for name, _, student, gained in accuracy_rows(report):
        found[name] = f"{student} ({gained})" if gained else student
    drop = report.accuracy.top1_drop_ci95 if report.accuracy else None
    if drop:
        found["95 % interval of the drop"] = f"{drop[0]:.2f} to {drop[1]:.2f} points"
    for name, _, student, ratio in speed_rows(report):
        found[name] = f"{student} ({ratio} of its source)"
    found["trained"] = f"{report.train.steps:,} steps, {report.train.images:,} images"
    return found


def cautions(results: Sequence[Result]) -> list[str]:
    """Why the numbers of several files may not be held against each other."""
    reports = [result.report for result in results]
    found = []
    measured = {(r.accuracy.data, r.accuracy.num_images) for r in reports if r.accuracy}
    if len(measured) > 1:
        found.append("They were measured on different images: " + "; ".join(sorted(data for data, _ in measured)) + ".")
    if len({r.model for r in reports}) > 1:
        found.append("They come from different models: drops and ratios are each against their own.")
    if len({(r.speed.device, r.speed.threads) for r in reports if r.speed}) > 1:
        found.append("Their latencies were measured on different devices or numbers of threads.")
    return found


def print_compared(results: Sequence[Result], names: Sequence[str], console: Console) -> None:
    """Print several files side by side."""
    table = Table("", *(escape(name) for name in names))
    for row in compared_rows(results):
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for line in cautions(results):
        console.print(line, markup=False, highlight=False)


def compared_html(results: Sequence[Result]) -> str:
    """Several files side by side as a page, like `to_html`."""
    shared = [Result(r.name, r.file_bytes, shareable(r.report), without_places(r.recipe)) for r in results]
    names = _told_apart([result.name for result in shared])
    points = [
        Point(name, result.report.size.student_bytes, result.report.accuracy.student_top1, "student")
        for name, result in zip(names, shared, strict=True)
        if result.report.accuracy and result.report.accuracy.student_top1 is not None
    ]
    points += _references([result.report for result in shared])
    return PAGES.get_template("compare.html.j2").render(
        names=names,
        rows=compared_rows(shared),
        cautions=cautions(shared),
        plot=size_plot(points, "size against top-1"),
        commands=[(name, result.report.command) for name, result in zip(names, shared, strict=True)],
    )


def _told_apart(names: Sequence[str]) -> list[str]:
    """The same names, numbered where several files in different folders have one."""
    return [
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _references(reports: Sequence[Report]) -> list[Point]:
    """Teachers and baselines of several reports, each once; named by their model where there is more than one."""
    several = len({report.model for report in reports}) > 1
    found = [
        point._replace(name=f"{report.model} {point.name}" if several else point.name)
        for report in reports
        for point in points_of(report)
        if point.kind != "student"
    ]
    return list({(point.name, point.num_bytes, point.top1): point for point in found}.values())
