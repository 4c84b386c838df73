"""The command `compress`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vitcompress.cli.output import Results, command_line, exit_on_missed, put_yaml, reporting
from vitcompress.cli.recipe_flags import LogOption, PresetOption, QuietOption, RecipeOption, takes
from vitcompress.errors import RecipeError
from vitcompress.recipe import STAGES, GateRecipe, ModelRecipe, Recipe, compose
from vitcompress.report import Report
from vitcompress.report.gates import missed_gates
from vitcompress.report.terminal import print_plan, print_report
from vitcompress.runtime.console import STARTED, Reporter, is_main


@takes(*STAGES)
def compress(
    flags: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="File to write; its reports are written beside it.", show_default=False)
    ] = None,
    recipe: RecipeOption = None,
    preset: PresetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the recipe and the plan, print both, and stop. "
            "Weights, images, --out and this machine are not checked.",
        ),
    ] = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Compress a model into one verified .safetensors file with a report.

    The source model is the teacher unless --teacher is given.
    """
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(flags, file=recipe, preset=preset, family_name=family_name)
        if dry_run:
            _print_dry_run(resolved, reporter)
            return
        if out is None:
            raise RecipeError("--out is missing.", hint="Give --out FILE, or --dry-run to write nothing.")
        from vitcompress.pipeline import compress
        from vitcompress.runtime import launch

        if launch.must_start(resolved.run):
            compress.check(resolved, out)
            sys.exit(launch.start(resolved.run, sys.argv[1:]))
        result = compress.compress(resolved, out, reporter=reporter, command=command_line(), started=STARTED)
        print_result(result, resolved.gates, out, reporter)


def family_name(model: ModelRecipe) -> str:
    """Return the family of a model, for a preset's defaults."""
    from vitcompress.pipeline import plan

    return plan.family_name(model)


def print_result(result: Report, gates: GateRecipe, out: Path, reporter: Reporter) -> None:
    """Print a report and check the file against its gates, in the main process."""
    if is_main():
        print_report(result, Results())
        if gates != GateRecipe():
            exit_on_missed(missed_gates(result, gates, file_bytes=out.stat().st_size), reporter)


def _print_dry_run(recipe: Recipe, reporter: Reporter) -> None:
    """Print the plan on stderr, and on stdout a recipe file with every default."""
    from vitcompress.pipeline import compress
    from vitcompress.pipeline.checks import with_images

    plan, notes = compress.dry_run(recipe)
    recipe = with_images(recipe, plan)
    if plan is None:
        reporter.say(f"{recipe.model.model}: the plan is searched for during the run, on its weights and images.")
    else:
        print_plan(plan, recipe.model.model, Console(stderr=True, quiet=reporter.console.quiet))
    for note in notes:
        reporter.say(note)
    put_yaml(compose.to_dict(recipe))
