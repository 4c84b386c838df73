"""The command `finetune`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from vitcompress.cli.compress import family_name, print_result
from vitcompress.cli.output import command_line, reporting
from vitcompress.cli.recipe_flags import LogOption, OutOption, QuietOption, RecipeOption, takes
from vitcompress.recipe import compose
from vitcompress.runtime.console import STARTED


@takes(
    "model", "data", "teacher", "distill", "store", "run", "gates",
    without=("baselines", "allow_weak_teacher", "fade"),
    helps={
        "model": "A file that compress or finetune wrote; or a model as compress takes it.",
        "data": "Training images: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in.",
        "teacher": "Model to learn from: a timm name, hf-hub:…, local-dir:… or a vitcompress file. "
        "Default: the file's source, if the classes are the same.",
        "store": "Number format of the file. Default: the input file's.",
    },
)  # fmt: skip
def finetune(
    out: OutOption,
    flags: dict[str, Any],
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Rows and columns of an image, in pixels; default: the model's.")
    ] = None,
    recipe: RecipeOption = None,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Fine-tune a model, compressed or not, on other classes or another image size.

    Shared weights stay shared.
    """
    with reporting(log_json, quiet=quiet) as reporter:
        resolved = compose.build(flags, file=recipe, family_name=family_name, fills_built_in=False)
        from vitcompress.pipeline import finetune
        from vitcompress.runtime import launch

        model = resolved.model.model
        if launch.must_start(resolved.run):
            finetune.check(model, resolved, out, img_size=img_size)
            sys.exit(launch.start(resolved.run, sys.argv[1:]))
        result = finetune.finetune(
            model, resolved, out, img_size=img_size, reporter=reporter, command=command_line(), started=STARTED
        )
        print_result(result, resolved.gates, out, reporter)
