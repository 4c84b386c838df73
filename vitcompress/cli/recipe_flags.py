"""Options of several commands; and the fields of a recipe's stages, as command-line flags."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vitcompress.recipe import FlagSpec, flag_specs

# The flags that most people need first; the rest of a long list is shown under "Advanced".
ESSENTIAL = (
    "model", "checkpoint", "share", "width", "target_ratio", "target_size", "target_drop", "data", "val_data",
    "steps", "max_minutes", "store", "max_drop",
)  # fmt: skip
_MAX_UNGROUPED = 15
_OUTPUT_OPTIONS = ("as_json", "quiet", "log_json")  # listed after the others
LABEL_FLAGS = ("image_key", "label_key", "class_map", "class_order")
IMAGE_FLAGS = ("data", *LABEL_FLAGS, "skip_bad_images", "batch_size", "num_workers")

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file that vitcompress compress or finetune wrote.")
]
OutOption = Annotated[Path, typer.Option(help="File to write; its reports are written beside it.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Name of a built-in recipe (see vitcompress recipes), or a YAML file. Flags override its values.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="minivit",
        help="Use the settings of the released MiniViT code as defaults. Flags override these defaults.",
    ),
]
HtmlOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report.")]
CheckpointOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights of the teacher.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
LogOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-",
        help="Write events to this file as JSON lines. With -, write them to stderr instead of the progress.",
    ),
]


def takes(
    *stages: str,
    only: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    helps: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a recipe's stages; it receives the typed ones as `flags`.

    Every flag defaults to None, so that one that is not typed keeps the value of a recipe file.

    Args:
        stages: names of stages of `vitcompress.recipe.Recipe`.
        only: names of the fields to take; all if empty.
        without: names of the fields to leave out.
        helps: help texts by field name, where the command uses a field in another way.
    """
    helps = helps or {}
    specs = [
        dataclasses.replace(spec, help=helps.get(spec.name, spec.help))
        for spec in flag_specs(*stages)
        if (not only or spec.name in only) and spec.name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            flags = {spec.name: values.pop(spec.name) for spec in specs}
            command(**values, flags={name: value for name, value in flags.items() if value not in (None, [])})

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _ordered(specs, options)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _ordered(specs: list[FlagSpec], options: list[inspect.Parameter]) -> Iterator[inspect.Parameter]:
    """Yield a command's parameters as its help lists them: essential flags first, then by stage."""
    grouped = len(specs) > _MAX_UNGROUPED
    yield from (_parameter(spec, None) for spec in specs if spec.name == "model")
    yield from (p for p in options if p.name not in _OUTPUT_OPTIONS)
    rest = [spec for spec in specs if spec.name != "model"]
    yield from (_parameter(spec, None) for spec in rest if not grouped or spec.name in ESSENTIAL)
    yield from (p for p in options if p.name in _OUTPUT_OPTIONS)
    for spec in rest if grouped else ():
        if spec.name not in ESSENTIAL:
            yield _parameter(spec, f"Advanced: {spec.stage}")


def _parameter(spec: FlagSpec, panel: str | None) -> inspect.Parameter:
    """Return the command-line parameter of a recipe's field."""
    if spec.name == "model":
        declared: Any = typer.Argument(metavar="MODEL", help=spec.help, show_default=False)
    else:
        default = escape(f" [default: {spec.shown_default}]") if spec.shown_default else ""
        declared = typer.Option(
            help=spec.help + default, show_default=False, metavar=spec.metavar or None, rich_help_panel=panel
        )
    annotation: Any = Annotated[spec.cli_type | None, declared]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
