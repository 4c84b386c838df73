"""What can be typed?  Typer commands, thin shells over `vitcompress.pipeline.compress`.

torch and timm are imported inside the commands: `--help` and `--version` must answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

import vitcompress
from vitcompress import recipe as recipes
from vitcompress.cli.endings import EXIT_GATE, Results, put, reporting, user_errors
from vitcompress.cli.flags import takes
from vitcompress.errors import RecipeError, VitcompressError
from vitcompress.recipe import compose, shipped
from vitcompress.runtime import signals as interrupts
from vitcompress.runtime.console import STARTED, Reporter, is_main

if TYPE_CHECKING:
    from vitcompress.report.model import Report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file that vitcompress compress or finetune wrote.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="NAME|FILE", help="A recipe that comes with the package, or a YAML file of these options; flags win."
    ),
]
PresetOption = Annotated[
    str | None, typer.Option(help="Defaults to start from: minivit, what its released code has. Other options win.")
]
HtmlOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a page to look at: one file, with nothing to load.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
LogOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-", help="Events as lines of JSON, to a file; - for stderr, where nothing else is then."
    ),
]


def main() -> None:
    """Run the command line."""
    interrupts.watch()
    with user_errors():
        app()


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Make pretrained Vision Transformers small, after the fact, by sharing weights between blocks."""
    if version:
        put(vitcompress.__version__)
        raise typer.Exit
    for name in ("accelerate", "matplotlib", "timm", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their notices would stand between our lines
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries too; what comes of them is told


@app.command()
@takes(*recipes.STAGES)
def compress(
    flags: dict[str, Any],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; its reports are written beside it.", show_default=False)
    ] = None,
    recipe: RecipeOption = None,
    preset: PresetOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything but weights and images, print plan and recipe, and stop."),
    ] = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Compress a model: share, distil, verify, evaluate, and write one .safetensors file."""
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(flags, file=recipe, preset=preset, family_name=_family_name)
        if dry_run:
            _show_dry_run(resolved, reporter)
            return
        if out is None:
            raise RecipeError("--out is missing.", hint="Give --out FILE, or --dry-run to write nothing.")
        from vitcompress.pipeline import compress as pipeline
        from vitcompress.pipeline import deliver
        from vitcompress.runtime import launch

        if launch.must_start(resolved.run):
            pipeline.check(resolved, out)
            sys.exit(launch.start(resolved.run, sys.argv[1:]))
        command = deliver.command_line(sys.argv[1:])
        result = pipeline.compress(resolved, out, reporter=reporter, command=command, started=STARTED)
        _conclude(result, resolved.gates, out, reporter)


@app.command()
@takes("data", "teacher", "distill", "store", "run", "gates", without=("baselines",))
def finetune(
    file: FileArgument,
    out: Annotated[Path, typer.Option(help="The file to write; its reports are written beside it.")],
    flags: dict[str, Any],
    img_size: Annotated[int | None, typer.Option(min=1, help="Image size in pixels; default: the file's.")] = None,
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Teach a file other classes or another image size; what its blocks share stays shared."""
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build({"model": file.name, **flags}, file=recipe, family_name=_family_name)
        from vitcompress.pipeline import deliver
        from vitcompress.pipeline import finetune as transfer
        from vitcompress.runtime import launch

        if launch.must_start(resolved.run):
            transfer.check(file, resolved, out, img_size=img_size)
            sys.exit(launch.start(resolved.run, sys.argv[1:]))
        command = deliver.command_line(sys.argv[1:])
        result = transfer.finetune(
            file, resolved, out, img_size=img_size, reporter=reporter, command=command, started=STARTED
        )  # fmt: skip
        _conclude(result, resolved.gates, out, reporter)


@app.command()
@takes("model", "plan", "target", "store", without=("qat_fraction", "baselines"))
def plan(
    flags: dict[str, Any],
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|built-in", help="Images to measure on what each option costs, or to search a target's plan on."
        ),
    ] = None,
    calibration_images: Annotated[int | None, typer.Option(min=1, help="Images of them that are used.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to measure on.")] = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Show what would be shared and how many parameters remain; loads weights only to measure or to search."""
    more = {"data": calibrate, "calibration_images": calibration_images, "device": device}
    typed = {**flags, **{name: value for name, value in more.items() if value is not None}}
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(typed, preset=preset, family_name=_family_name)
        from vitcompress.pipeline import compress as pipeline
        from vitcompress.report import events
        from vitcompress.report.model import to_json
        from vitcompress.report.terminal import print_options, print_plan

        if calibrate is not None and not resolved.target.is_given:
            options = pipeline.sensitivities(resolved, reporter=reporter)
            _print_json(options) if as_json else print_options(options, resolved.model.model, Results())
            return
        if resolved.target.is_given:
            found = pipeline.search(resolved, reporter=reporter)
        else:
            found = pipeline.plan(resolved.model, resolved.plan, resolved.store.kind)
        events.tell_plan(reporter, resolved.model.model, found)
        if as_json:
            _print_json(to_json(found))
        else:
            print_plan(found, resolved.model.model, Results())


@app.command(name="report")
@takes("data", only=("data", "image_key", "label_key", "class_map", "skip_bad_images", "batch_size", "num_workers"))
def show_report(
    file: FileArgument,
    flags: dict[str, Any],
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a comment.")] = False,
    html: HtmlOption = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the teacher, with --data.")] = None,
) -> None:
    """Show the report stored in a file; with --html and --data, also images on which it differs from its teacher."""
    if (flags or checkpoint) and (html is None or "data" not in flags):
        raise VitcompressError(
            "Images are for a page alone.", hint="Give --html PAGE --data DIR, or vitcompress evaluate."
        )
    found = _stored_report(file)
    from vitcompress.report.model import to_json
    from vitcompress.report.page import to_html
    from vitcompress.report.terminal import print_report, to_markdown

    if html is not None:
        from vitcompress.pipeline import results

        results.check_page(html, [file], checkpoint)
    if as_json:
        _print_json(to_json(found))
    elif markdown:
        put(to_markdown(found))
    elif html is None:
        print_report(found, Results())
    if html is not None:
        data = compose.build({"model": "", **flags}).data
        reporter = Reporter()
        seen = results.examples_of(file, data, checkpoint=checkpoint, reporter=reporter) if flags else None
        results.write_page(html, to_html(results.result_of(file), seen), reporter)


@app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Two or more files of vitcompress.")],
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show several files side by side: sizes, accuracies, latencies."""
    with user_errors():
        if len(files) < 2:
            raise VitcompressError("There is one file only.", hint="vitcompress report FILE shows it.")
        from vitcompress.pipeline.results import check_page, result_of, write_page
        from vitcompress.report.diff import compared_html, print_compared
        from vitcompress.report.model import to_json

        if html is not None:
            check_page(html, files)
        results = [result_of(file) for file in files]
        if html is not None:
            write_page(html, compared_html(results), Reporter())
        if as_json:
            _print_json([{"file": r.name, "file_bytes": r.file_bytes, **to_json(r.report)} for r in results])
        elif html is None:
            print_compared(results, list(map(str, files)), Results())


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A file of vitcompress.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: JsonOption = False,
) -> None:
    """Show what is different about two files: plan, recipe, numbers, versions."""
    with user_errors():
        from vitcompress.pipeline.results import result_of
        from vitcompress.report.diff import differences, print_differences

        found = differences(result_of(first), result_of(second))
        if as_json:
            _print_json([row._asdict() for row in found])
        else:
            print_differences(found, (str(first), str(second)), Results())


@app.command()
@takes("data", only=("data", "image_key", "label_key", "class_map", "skip_bad_images", "batch_size", "num_workers"))
def evaluate(
    file: FileArgument,
    flags: dict[str, Any],
    teacher: Annotated[
        str | None, typer.Option(help="Compare with this model, or another file; default: the file's source.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the teacher.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Measure a file on images: top-1, top-5 and agreement with the teacher where that can be had."""
    with reporting(log_json, quiet=quiet) as reporter:
        data = compose.build({"model": teacher or "", **flags}).data
        from vitcompress.pipeline import compress as pipeline
        from vitcompress.report.model import to_json
        from vitcompress.report.terminal import print_accuracy

        reference = recipes.ModelRecipe(teacher, checkpoint) if teacher else None
        accuracy = pipeline.evaluate(file, data, teacher=reference, checkpoint=checkpoint, reporter=reporter)
        if as_json:
            _print_json(to_json(accuracy))
        else:
            print_accuracy(accuracy, Results())


@app.command()
@takes("gates")
def check(file: FileArgument, flags: dict[str, Any], log_json: LogOption = None) -> None:
    """Hold a file against gates; exit code 3 and one line per gate that it misses."""
    with reporting(log_json) as reporter:
        gates = compose.build({"model": "", **flags}).gates
        if not flags:
            raise VitcompressError("There is no gate to check.", hint="Give --max-drop, --min-ratio or --max-size.")
        from vitcompress.artifact import hub
        from vitcompress.report.gates import missed_gates

        found = hub.locate(file)
        _exit_on(missed_gates(_stored_report(found), gates, file_bytes=found.stat().st_size), reporter)
        put("every gate is met")


@app.command()
def export(
    file: FileArgument,
    to: Annotated[str, typer.Option(metavar="onnx|pt2|executorch|timm|hf", help="The format.")],
    out: Annotated[Path, typer.Option(help="The file to write; for hf, the folder.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images to compare outputs on; default: built-in ones and noise.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images of them that are used.")] = 64,
    push: Annotated[
        str | None, typer.Option(metavar="USER/REPO", help="Upload the folder of hf to the Hugging Face Hub.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Write a file in another format, read it back, and make sure that it computes the same."""
    with user_errors(), reporting(log_json, quiet=quiet) as reporter:
        from vitcompress.export import export as write
        from vitcompress.report.model import to_json

        done = write(file, to, out, data=data, num_images=num_images, push=push, reporter=reporter)
        if as_json:
            _print_json(to_json(done))
        else:
            for line in done.lines():
                put(line)


@app.command()
def doctor() -> None:
    """Show what this machine can do: versions, devices, precisions, and what is missing for which extra."""
    from vitcompress.cli import doctor as machine

    for line in machine.lines():
        put(line)


@app.command()
def models(
    pattern: Annotated[
        str | None, typer.Argument(help="A part of a name, like deit3, or a shell pattern; default: the short names.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List models that can be compressed, with their parameters before and after the default --share."""
    with user_errors():
        from vitcompress.cli import models as survey
        from vitcompress.report.model import to_json

        with Reporter(quiet=quiet).counting("counting parameters") as tell:
            found = survey.survey(pattern, tell=tell)
        _print_json(to_json(found)) if as_json else survey.print_survey(found, Results())


shipped_app = typer.Typer(help="List the recipes that come with the package, or show one.")
app.add_typer(shipped_app, name="recipes")


@shipped_app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with the package; `recipes show NAME` prints one."""
    if context.invoked_subcommand is None:
        for name in shipped.recipe_names():
            put(f"{name:<28}{yaml.safe_load(shipped.recipe_text(name))['notes']['what']}")


@shipped_app.command(name="show")
def show_recipe(name: Annotated[str, typer.Argument(help="As vitcompress recipes lists it.")]) -> None:
    """Print a recipe as YAML, with what was published and measured of it."""
    with user_errors():
        put(shipped.recipe_text(name), nl=False)


def _show_dry_run(resolved: recipes.Recipe, reporter: Reporter) -> None:
    """Show the plan on stderr; print the recipe with its preset and every default, as a recipe file has it."""
    from vitcompress.initialize.start import needs_images
    from vitcompress.pipeline import compress as pipeline
    from vitcompress.pipeline.checks import with_images
    from vitcompress.report.terminal import print_plan

    found, notes = pipeline.dry_run(resolved)
    resolved = with_images(resolved, fitted=found is None or needs_images(found, resolved.start.start))
    if found is None:
        reporter.say(f"{resolved.model.model}: the plan is searched for when it runs, on its weights and images.")
    else:
        print_plan(found, resolved.model.model, Console(stderr=True, quiet=reporter.console.quiet))
    for note in notes:
        reporter.say(note)
    put(yaml.safe_dump(compose.to_dict(resolved), sort_keys=False, allow_unicode=True), nl=False)


def _family_name(model: recipes.ModelRecipe) -> str:
    from vitcompress.pipeline import compress as pipeline

    return pipeline.family_name(model)


def _stored_report(file: Path) -> Any:
    from vitcompress.artifact import file as artifact
    from vitcompress.artifact import hub
    from vitcompress.report.reading import from_json

    return from_json(artifact.read_manifest(hub.locate(file)).report)


def _conclude(result: Report, gates: recipes.GateRecipe, out: Path, reporter: Reporter) -> None:
    """Print a report and hold the file against its gates; of several processes, the main one does."""
    if is_main():
        from vitcompress.report.gates import missed_gates
        from vitcompress.report.terminal import print_report

        print_report(result, Results())
        if gates != recipes.GateRecipe():
            _exit_on(missed_gates(result, gates, file_bytes=out.stat().st_size), reporter)


def _exit_on(missed: list[str], reporter: Reporter) -> None:
    reporter.tell("gate", missed=missed)
    for line in missed:
        if not (reporter.log and reporter.log.stream is sys.stderr):
            typer.echo(f"missed: {line}", err=True)
    if missed:
        raise typer.Exit(EXIT_GATE)


def _print_json(tree: dict[str, Any] | list[dict[str, Any]]) -> None:
    put(json.dumps(tree, indent=2))
