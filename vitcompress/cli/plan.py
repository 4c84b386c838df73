"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitcompress.cli.compress import family_name
from vitcompress.cli.output import Results, command_line, put_json, reporting
from vitcompress.cli.recipe_flags import LABEL_FLAGS, JsonOption, LogOption, PresetOption, QuietOption, takes
from vitcompress.errors import RecipeError, raise_faults
from vitcompress.pipeline.pages import check_picture, write_page
from vitcompress.recipe import Recipe, compose, flag_specs
from vitcompress.report import events
from vitcompress.report.model import to_json
from vitcompress.report.terminal import print_options, print_plan
from vitcompress.runtime.console import Reporter

if TYPE_CHECKING:
    from vitcompress.plans.model import Plan


def _help_of(stage: str, name: str) -> str:
    """Return the help text of a recipe's field."""
    return next(spec.help for spec in flag_specs(stage) if spec.name == name)


_LEFT_OUT = tuple(spec.name for spec in flag_specs("data") if spec.name not in (*LABEL_FLAGS, "skip_bad_images"))


@takes("model", "plan", "target", "store", "data", without=("qat_fraction", "baselines", *_LEFT_OUT))
def plan(
    flags: dict[str, Any],
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|built-in",
            help="Measure on these images how much each way of compressing costs. "
            "With --target-…, use them for the search.",
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, show_default=False, help=_help_of("start", "calibration_images"))
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Device to measure on.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep what was measured in this JSON file, for --options.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --save: go on with a measurement that was interrupted.")
    ] = False,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier", help="Show the predicted cost of the best plans for many sizes, to choose where to stop."
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --frontier: also draw it, as .svg or as .html.", show_default=False),
    ] = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Show which blocks share what and how many parameters remain.

    Loads weights only with --calibrate, with --frontier or with a --target-… flag.
    """
    measuring = {"data": calibrate, "calibration_images": calibration_images, "device": device}
    flags = {**flags, **{name: value for name, value in measuring.items() if value is not None}}
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(
            {**flags, **({"resume": True} if resume else {})}, preset=preset, family_name=family_name
        )
        _check(resolved, calibrates=calibrate is not None, frontier=frontier, save=save, plot=plot)
        from vitcompress.pipeline import plan

        name = resolved.model.model
        if frontier:
            _show_frontier(resolved, save, plot, reporter, as_json=as_json)
        elif resolved.target.is_given:
            _show_plan(resolved, plan.search(resolved, reporter=reporter, save=save), reporter, as_json=as_json)
        elif calibrate is not None:
            options = plan.sensitivities(resolved, reporter=reporter, save=save)
            put_json(options) if as_json else print_options(options, name, Results())
        else:
            student_plan = plan.plan(resolved.model, resolved.plan, resolved.store.kind)
            for note in plan.preprocessing(resolved.model)[1]:  # a search tells them itself
                reporter.say(note)
            _show_plan(resolved, student_plan, reporter, as_json=as_json)


def _check(recipe: Recipe, *, calibrates: bool, frontier: bool, save: Path | None, plot: Path | None) -> None:
    """Make sure that the flags fit together.

    Raises:
        RecipeError: they do not; every fault at once.
    """
    target, options = recipe.target, recipe.target.options
    measure = "Give --calibrate DIR."
    faults = [
        (frontier and target.is_given, "--frontier and --target-… cannot be used together.", "Give only one of them."),
        (frontier and not calibrates and options is None, "--frontier needs measured options.",
         "Give --calibrate DIR or --options FILE."),
        (options is not None and not (frontier or target.is_given), "--options needs a target or --frontier.",
         "Give --target-ratio, --target-size, --target-drop or --frontier."),
        (save is not None and options is not None, "--save and --options cannot be used together.",
         "Remove --save: the options are not measured again."),
        (save is not None and not (calibrates or target.is_given or frontier), "--save: nothing is measured.", measure),
        (recipe.run.resume and save is None, "--resume needs --save, which names what was measured.",
         "Give --save FILE."),
        (plot is not None and not frontier, "--plot needs --frontier.", "Give --frontier."),
    ]  # fmt: skip
    raise_faults(RecipeError, [(message, hint) for is_fault, message, hint in faults if is_fault])
    if plot is not None:
        check_picture(recipe, plot)


def _show_frontier(recipe: Recipe, save: Path | None, plot: Path | None, reporter: Reporter, *, as_json: bool) -> None:
    """Trace the frontier, draw it and print it."""
    from vitcompress.pipeline import plan
    from vitcompress.report import frontier as report

    points, name = plan.frontier(recipe, reporter=reporter, save=save), recipe.model.model
    if plot is not None:
        drawn = report.frontier_svg(points, name)
        write_page(
            plot, drawn if plot.suffix == ".svg" else report.frontier_html(points, name, command_line()), reporter
        )
    put_json(report.frontier_json(points)) if as_json else report.print_frontier(points, name, Results())


def _show_plan(recipe: Recipe, student_plan: Plan, reporter: Reporter, *, as_json: bool) -> None:
    """Print a plan."""
    from vitcompress.pipeline import plan

    name, kind = recipe.model.model, plan.outputs_kind(recipe.model)
    preprocessing, _ = plan.preprocessing(recipe.model)
    events.tell_plan(reporter, name, student_plan)
    if as_json:
        put_json({**to_json(student_plan), "preprocessing": preprocessing, "outputs": kind.name})
    else:
        print_plan(student_plan, name, Results(), preprocessing=preprocessing, outputs=kind.noun)
