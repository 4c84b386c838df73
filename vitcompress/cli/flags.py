"""Turn the fields of a recipe's stages into command-line flags."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.markup import escape

from vitcompress.cli.exits import user_errors
from vitcompress.recipe import FlagSpec, flag_specs

# The flags that most people need first; the rest of a long list is shown under "Advanced".
ESSENTIAL = (
    "model", "checkpoint", "share", "width", "target_ratio", "target_size", "target_drop", "data", "val_data",
    "steps", "max_minutes", "store", "max_drop",
)  # fmt: skip
_MAX_UNGROUPED = 15
_OUTPUT_OPTIONS = ("as_json", "quiet", "log_json")  # listed after the others


def takes(
    *stages: str, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a recipe's stages; it receives the typed ones as `flags`.

    Every flag defaults to None, so that one that is not typed keeps the value of a recipe file.

    Args:
        stages: names of stages of `vitcompress.recipe.Recipe`.
        only: names of the fields to take; all if empty.
        without: names of the fields to leave out.
    """
    specs = [spec for spec in flag_specs(*stages) if (not only or spec.name in only) and spec.name not in without]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            flags = {spec.name: values.pop(spec.name) for spec in specs}
            with user_errors():
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
