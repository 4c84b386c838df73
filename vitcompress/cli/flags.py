"""Which flags does a command have?  Those of the fields of some of the recipe's stages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from vitcompress import recipe as recipes
from vitcompress.cli.exits import user_errors


def takes(
    *stages: str, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of a recipe's stages; it gets those that were typed as `flags`.

    Every flag defaults to None, so that one that was not typed leaves the recipe file's value alone.

    Args:
        stages: of `vitcompress.recipe.Recipe`.
        only: names of the fields to take; all where empty.
        without: names of fields not to take.
    """
    chosen = [
        spec for spec in recipes.flag_specs(*stages) if (not only or spec.name in only) and spec.name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
        extra = [_parameter(spec) for spec in chosen]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            flags = {spec.name: values.pop(spec.name) for spec in chosen}
            with user_errors():
                command(**values, flags={name: value for name, value in flags.items() if value not in (None, [])})

        signature = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*extra, *own)]
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature}
        return run

    return decorate


def _parameter(spec: recipes.FlagSpec) -> inspect.Parameter:
    """The command-line parameter of a recipe's field."""
    if spec.name == "model":
        declared: Any = typer.Argument(metavar="MODEL", help=spec.help, show_default=False)
    else:
        declared = typer.Option(
            help=spec.help, show_default=spec.shown_default or False, rich_help_panel=spec.stage.capitalize()
        )
    annotation: Any = Annotated[spec.cli_type | None, declared]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
