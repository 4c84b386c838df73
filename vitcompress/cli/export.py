"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitcompress.cli.output import put, put_json, reporting
from vitcompress.cli.recipe_flags import LABEL_FLAGS, FileArgument, JsonOption, LogOption, QuietOption, takes
from vitcompress.errors import VitcompressError
from vitcompress.recipe import compose, flag_of
from vitcompress.report.model import to_json


@takes("data", only=LABEL_FLAGS)
def export(
    file: FileArgument,
    flags: dict[str, Any],
    to: Annotated[str, typer.Option(metavar="onnx|pt2|executorch|timm|hf", help="Format to write.")],
    out: Annotated[Path, typer.Option(help="File to write; for hf, a folder.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Images to compare outputs on; default: built-in ones and noise."),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images to use.")] = 64,
    push: Annotated[
        str | None, typer.Option(metavar="USER/REPO", help="Upload the folder of hf to the Hugging Face Hub.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    log_json: LogOption = None,
) -> None:
    """Write a file in another format, read it back, and check that it computes the same outputs."""
    with reporting(log_json, quiet=quiet) as reporter:
        if flags and data is None:
            raise VitcompressError(f"{flag_of(next(iter(flags)))} requires --data.", hint="Give --data DIR.")
        images = compose.build({"model": "", "data": data, **flags}).data if data else None
        from vitcompress.export import export

        exported = export(file, to, out, data=images, num_images=num_images, push=push, reporter=reporter)
        if as_json:
            put_json(to_json(exported))
        else:
            for line in exported.lines():
                put(line)
