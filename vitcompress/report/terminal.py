"""Print reports, plans and measurements on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress.measure.results import Accuracy
from vitcompress.plans.model import Group, Plan
from vitcompress.report.model import Report
from vitcompress.report.remarks import (
    accuracy_remark,
    chance_warning,
    plan_remarks,
    preprocessing_remark,
    report_remarks,
)
from vitcompress.report.rows import COLUMNS, accuracy_rows, baseline_columns, baseline_rows, report_rows, size_rows
from vitcompress.report.sharing import describe_layers, describe_sharing, shared_names


def print_report(report: Report, console: Console) -> None:
    """Print a report: its tables and the sentences below them."""
    _print_title(report.model, report.groups, report.made_of, console)
    print_table(COLUMNS, report_rows(report), console, align_right=True)
    if report.baselines:
        print_table(baseline_columns(report), baseline_rows(report), console, align_right=True)
    print_lines(report_remarks(report), console)


def print_plan(plan: Plan, name: str, console: Console, *, preprocessing: str = "", outputs: str = "") -> None:
    """Print the groups of a plan and the sizes before and after.

    Args:
        plan: plan to print.
        name: name of the model.
        console: console to print on.
        preprocessing: how images become the model's input, in one line; empty to leave it out.
        outputs: what the model's outputs are; empty to leave it out.
    """
    _print_title(name, [len(group.blocks) for group in plan.groups], plan.groups, console)
    columns = ["group", "donor", "blocks", "changed"]
    rows = [
        [
            str(number),
            group.donor,
            ", ".join(block.rpartition(".")[2] for block in group.blocks),
            describe_layers(group),
        ]
        for number, group in enumerate(plan.groups)
    ]
    if all(group.is_plain for group in plan.groups):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows, console)
    shared = sorted({name for group in plan.groups if len(group.blocks) > 1 for name in shared_names(group)})
    lines = [
        f"shared in each group: {', '.join(shared) or 'nothing'}",
        f"kept by each block:   {'all other parameters' if shared else 'all parameters'}",
    ]
    if plan.transforms:
        lines.append(f"added to each block:  transformations {', '.join(plan.transforms)}")
    if outputs:
        lines.append(f"outputs:              {outputs}")
    about_images = [preprocessing_remark(preprocessing)] if preprocessing else []
    print_lines([*lines, *plan_remarks(plan.groups, plan.why), *about_images], console)
    print_table(COLUMNS, size_rows(plan.size), console)


def print_options(options: Sequence[Mapping[str, Any]], name: str, console: Console) -> None:
    """Print what each option of a search would cost, a row for each run of blocks and scale.

    Args:
        options: options from `pipeline.sensitivities`.
        name: name of the model.
        console: console to print on.
    """
    lines: dict[tuple[str, str, str], list[str]] = {}
    for option in options:
        numbers = [block.rpartition("blocks.")[2] for block in option["blocks"]]
        blocks = option["blocks"][0].rpartition("blocks.")[0] + "–".join(dict.fromkeys((numbers[0], numbers[-1])))
        cost = f"{option['dial'] or 'whole'}: {option['nats']:.3g}, −{option['saved_params']:,}"
        lines.setdefault((blocks, option["scale"], option["kind"]), []).append(cost)
    console.print(f"{name}: cost of each option, where all else is cut to about half", style="bold", markup=False)
    columns = ("blocks", "what", "kind", "options")
    print_table(columns, [(*key, " · ".join(costs)) for key, costs in lines.items()], console)
    legend = "Options: width or rank (whole: shared or skipped): nats of KL divergence per image, −parameters saved."
    print_lines([legend], console)


def print_accuracy(accuracy: Accuracy, console: Console) -> None:
    """Print what was measured on one set of images."""
    print_table(COLUMNS, accuracy_rows(accuracy), console)
    print_lines([*chance_warning(accuracy), accuracy_remark(accuracy)], console)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: Console, *, align_right: bool = False
) -> None:
    """Print a table; names in it may hold what rich would take for markup.

    Args:
        columns: heads of the columns.
        rows: rows of cells.
        console: console to print on.
        align_right: align all columns but the first on the right.
    """
    table = Table(escape(columns[0]))
    for column in columns[1:]:
        table.add_column(escape(column), justify="right" if align_right else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Print each line as it is, without markup."""
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False)


def _print_title(name: str, sizes: Sequence[int], groups: Sequence[Group], console: Console) -> None:
    """Print the line above a table."""
    title = f"{name}: {describe_sharing(sizes, groups)}"
    console.print(title, style="bold", markup=False, emoji=False, highlight=False)
