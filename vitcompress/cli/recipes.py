"""The command `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from vitcompress.cli.exits import user_errors
from vitcompress.cli.output import put
from vitcompress.recipe import shipped

app = typer.Typer(help="List the built-in recipes, or show one.")


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the built-in recipes; `recipes show NAME` prints one."""
    if context.invoked_subcommand is None:
        for name in shipped.recipe_names():
            put(f"{name:<28}{yaml.safe_load(shipped.recipe_text(name))['notes']['what']}")


@app.command()
@user_errors()
def show(name: Annotated[str, typer.Argument(help="Name in the list of vitcompress recipes.")]) -> None:
    """Print a recipe as YAML, with its published and measured results."""
    put(shipped.recipe_text(name), nl=False)
