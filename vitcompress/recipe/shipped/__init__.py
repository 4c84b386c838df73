"""Recipes that come with the package: the YAML files of this folder, by name.

Besides the stages, each file has `notes`: what the recipe is, what was published, what was measured
with this code, what is unknown, how it differs from the publication, and the command that runs it.
"""

from __future__ import annotations

from pathlib import Path

from vitcompress.errors import RecipeError, nearest

HERE = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """Return the YAML text of a recipe.

    Raises:
        RecipeError: no recipe has this name; the message suggests the nearest one.
    """
    if name not in recipe_names():
        raise RecipeError(
            f"{name}: no recipe of that name comes with vitcompress{nearest(name, recipe_names())}.",
            hint="`vitcompress recipes` lists them.",
        )
    return (HERE / f"{name}.yaml").read_text(encoding="utf-8")
