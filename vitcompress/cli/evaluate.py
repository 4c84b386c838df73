"""The command `evaluate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vitcompress.cli.output import Results, put_json, reporting
from vitcompress.cli.recipe_flags import (
    IMAGE_FLAGS,
    CheckpointKeyOption,
    CheckpointOption,
    FileArgument,
    JsonOption,
    LogOption,
    QuietOption,
    takes,
)
from vitcompress.recipe import ModelRecipe, compose
from vitcompress.report.model import to_json
from vitcompress.report.remarks import chance_warning
from vitcompress.report.terminal import print_accuracy


@takes(
    "data",
    only=IMAGE_FLAGS,
    helps={
        "data": "Images to measure on: a folder, wds:SHARDS, hfds:DIR, torch/NAME:DIR or built-in. "
        "Default: built-in, for a model that has built-in images.",
        "batch_size": "Images per batch. Default: 128.",
    },
)
def evaluate(
    file: FileArgument,
    flags: dict[str, Any],
    teacher: Annotated[
        str | None, typer.Option(help="Compare with this model or file; default: the file's source.")
    ] = None,
    checkpoint: CheckpointOption = None,
    checkpoint_key: CheckpointKeyOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Measure a file on images: top-1, top-5 and agreement with its teacher."""
    with reporting(log_json, quiet=quiet) as reporter:
        data = compose.build({"model": teacher or "", **flags}).data
        from vitcompress.pipeline import evaluate

        weights = evaluate.Checkpoint(checkpoint, checkpoint_key)
        reference = ModelRecipe(teacher, checkpoint, checkpoint_key=checkpoint_key) if teacher else None
        accuracy = evaluate.evaluate(file, data, teacher=reference, checkpoint=weights, reporter=reporter)
        if not as_json:
            print_accuracy(accuracy, Results())
            return
        for line in chance_warning(accuracy):
            reporter.say(line)
        put_json(to_json(accuracy))
