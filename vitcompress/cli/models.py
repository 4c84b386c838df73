"""The command `models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitcompress.cli.output import Results, put_json
from vitcompress.cli.recipe_flags import JsonOption, QuietOption
from vitcompress.errors import shorten
from vitcompress.report.model import to_json
from vitcompress.runtime.console import Reporter

if TYPE_CHECKING:
    from rich.console import Console

    from vitcompress.pipeline.survey import Survey


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(help="Part of a name, like deit3, or a shell pattern; default: models with a short name."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List models that can be compressed, with their parameters before and after --share 2."""
    from vitcompress.pipeline.survey import survey

    with Reporter(quiet=quiet).counting("counting parameters") as tell:
        result = survey(pattern, tell=tell)
    put_json(to_json(result)) if as_json else print_survey(result, Results())


def print_survey(survey: Survey, console: Console) -> None:
    """Print one line per model, easy to parse, and then what was left out."""
    width = max((len(row.name) for row in survey.rows), default=0)
    lines = [f"{'model':<{width}}  {'family':<8}{'parameters':>14}{f'--share {survey.share}':>15}   fewer"]
    lines += [
        f"{row.name:<{width}}  {row.family:<8}{row.teacher_params:>14,}{row.student_params:>15,}"
        f"{row.params_ratio:>7.2f}×"
        for row in survey.rows
    ]
    if survey.unfit:
        lines.append(f"cannot be compressed: {shorten(survey.unfit)}")
    if survey.num_more:
        lines.append(
            f"{survey.num_more} more timm models are not shown. To search them, run: vitcompress models PATTERN"
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
