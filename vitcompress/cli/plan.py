"""The command `plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitcompress.cli.compress import family_name
from vitcompress.cli.output import Results, put_json, reporting
from vitcompress.cli.recipe_flags import LABEL_FLAGS, JsonOption, LogOption, PresetOption, QuietOption, takes
from vitcompress.recipe import compose, flag_specs
from vitcompress.report import events
from vitcompress.report.model import to_json
from vitcompress.report.terminal import print_options, print_plan


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
    preset: PresetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Show which blocks share what and how many parameters remain.

    Loads weights only with --calibrate or with a --target-… flag.
    """
    measuring = {"data": calibrate, "calibration_images": calibration_images, "device": device}
    flags = {**flags, **{name: value for name, value in measuring.items() if value is not None}}
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(flags, preset=preset, family_name=family_name)
        from vitcompress.pipeline import plan

        name = resolved.model.model
        if calibrate is not None and not resolved.target.is_given:
            options = plan.sensitivities(resolved, reporter=reporter)
            put_json(options) if as_json else print_options(options, name, Results())
            return
        if resolved.target.is_given:
            student_plan = plan.search(resolved, reporter=reporter)
        else:
            student_plan = plan.plan(resolved.model, resolved.plan, resolved.store.kind)
        preprocessing, notes = plan.preprocessing(resolved.model)
        if not resolved.target.is_given:  # otherwise they were told before the search
            for note in notes:
                reporter.say(note)
        events.tell_plan(reporter, name, student_plan)
        kind = plan.outputs_kind(resolved.model)
        if as_json:
            put_json({**to_json(student_plan), "preprocessing": preprocessing, "outputs": kind.name})
        else:
            print_plan(student_plan, name, Results(), preprocessing=preprocessing, outputs=kind.noun)
