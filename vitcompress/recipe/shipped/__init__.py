"""Which recipes come with the package?  The YAML files of this folder, by name.

Besides the stages of any recipe file, each has `notes`: what it is, what was published of it, what was measured with
this code, what is not known, where it differs from what was published, and the command that runs it.
"""

from __future__ import annotations

from pathlib import Path

from vitcompress.errors import RecipeError, nearest

HERE = Path(__file__).parent


def recipe_names() -> list[str]:
    """Every name, in alphabetical order."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        RecipeError: there is none of that name, with the nearest.
    """
    if name not in recipe_names():
        raise RecipeError(
            f"{name}: no recipe of that name comes with vitcompress{nearest(name, recipe_names())}.",
            hint="vitcompress recipes lists them.",
        )
    return (HERE / f"{name}.yaml").read_text(encoding="utf-8")
