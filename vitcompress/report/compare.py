"""Set several files side by side, on the terminal and as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from vitcompress.report.model import Report, Result
from vitcompress.report.picture import Point, points_of
from vitcompress.report.private import shareable
from vitcompress.report.remarks import chance_warning
from vitcompress.report.rows import megabytes, report_accuracy_rows, size_rows, speed_rows
from vitcompress.report.sharing import describe_sharing
from vitcompress.report.terminal import print_lines, print_table


def print_compared(results: Sequence[Result], names: Sequence[str], console: Console) -> None:
    """Print several files side by side.

    Args:
        results: files to compare.
        names: column heads, one for each file.
        console: console to print on.
    """
    print_table(["", *names], compared_rows(results), console)
    print_lines(cautions(results), console)


def compared_html(results: Sequence[Result]) -> str:
    """Return several files side by side as one HTML page, safe to share and safe to open."""
    from vitcompress.report.page import size_plot  # imports yaml, which the terminal does not need
    from vitcompress.report.render import render

    results = [replace(result, report=shareable(result.report)) for result in results]
    names = _distinct([result.name for result in results])
    points = [
        Point(name, result.report.size.student_bytes, result.report.accuracy.student_top1, "student")
        for name, result in zip(names, results, strict=True)
        if result.report.accuracy and result.report.accuracy.student_top1 is not None
    ]
    points += _reference_points([result.report for result in results])
    return render(
        "compare.html.j2",
        names=names,
        rows=compared_rows(results),
        cautions=cautions(results),
        plot=size_plot(points, "size against top-1"),
        commands=[(name, result.report.command) for name, result in zip(names, results, strict=True)],
    )


def compared_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return a row for every measure that at least one file has, with a cell for each file."""
    columns = [_column(result) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "–") for column in columns)] for name in names]


def cautions(results: Sequence[Result]) -> list[str]:
    """Return the reasons why the numbers of several files cannot be compared."""
    reports = [result.report for result in results]
    lines = [f"{r.name}: {line}" for r in results if r.report.accuracy for line in chance_warning(r.report.accuracy)]
    images = {(r.accuracy.data, r.accuracy.num_images) for r in reports if r.accuracy}
    if len(images) > 1:
        lines.append("The files were measured on different images: " + "; ".join(sorted(n for n, _ in images)) + ".")
    if len(kinds := {r.outputs for r in reports if r.outputs}) > 1:
        lines.append(f"The files give different outputs, measured differently: {', '.join(sorted(kinds))}.")
    if len({r.model for r in reports}) > 1:
        lines.append("The files come from different models: drops and ratios are relative to each file's own source.")
    prepared = sorted({r.preprocessing for r in reports})
    if len({r.model for r in reports}) == 1 and len(prepared) > 1:
        lines.append(f"Images are prepared in different ways: {' / '.join(prepared)}.")
    if len({(r.speed.device, r.speed.threads) for r in reports if r.speed}) > 1:
        lines.append("Latencies were measured on different devices or numbers of threads.")
    return lines


def _column(result: Result) -> dict[str, str]:
    """Return the cells of one file by the names of their rows."""
    report = result.report
    cells = {
        "source": report.model,
        **({"outputs": report.outputs} if report.outputs else {}),
        "blocks": describe_sharing(report.groups, report.made_of),
        "transformations": ", ".join(report.transforms) or "–",
        "stored as": report.store,
        "file": megabytes(result.file_bytes),
    }
    for name, _, student, change in [*size_rows(report.size), *report_accuracy_rows(report)]:
        cells[name] = f"{student} ({change})" if change else student
    interval = report.accuracy.top1_drop_ci95 if report.accuracy else None
    if interval:
        cells["95 % interval of the drop"] = f"{interval[0]:.2f} to {interval[1]:.2f} points"
    for name, _, student, change in speed_rows(report):
        cells[name] = f"{student} ({change} than its source)"
    cells["trained"] = f"{report.train.steps:,} steps, {report.train.images:,} images"
    return cells


def _distinct(names: Sequence[str]) -> list[str]:
    """Number names that occur more than once, as those of files in different folders."""
    return [
        f"{name} ({names[: number + 1].count(name)})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


def _reference_points(reports: Sequence[Report]) -> list[Point]:
    """Return teachers and baselines, each once, with the model's name if models differ."""
    several = len({report.model for report in reports}) > 1
    points = [
        point._replace(name=f"{report.model} {point.name}" if several else point.name)
        for report in reports
        for point in points_of(report)
        if point.kind != "student"
    ]
    return list({(point.name, point.num_bytes, point.top1): point for point in points}.values())
