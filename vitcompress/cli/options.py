"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

IMAGE_FLAGS = ("data", "image_key", "label_key", "class_map", "skip_bad_images", "batch_size", "num_workers")

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file that vitcompress compress or finetune wrote.")
]
OutOption = Annotated[Path, typer.Option(help="File to write; its reports are written beside it.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="NAME|FILE",
        help="A recipe of the package, or a YAML file of these options. Flags override it.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(metavar="minivit", help="Start from the settings of the released MiniViT code. Flags override them."),
]
HtmlOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report.")]
CheckpointOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of the teacher.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
LogOption = Annotated[
    str | None,
    typer.Option(metavar="FILE|-", help="Write events as JSON lines; - means stderr, replacing progress output."),
]
