"""Check that an output file replaces nothing that must be kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitcompress.errors import RecipeError

SUFFIX = ".safetensors"


def check_not_an_input(flag: str, target: Path, inputs: Mapping[str, Path | None]) -> None:
    """Check that an output file is not one of the inputs.

    Args:
        flag: option that names the output file.
        target: path of the output file.
        inputs: paths of the inputs, by the name that messages use for them.

    Raises:
        RecipeError: the output file is an input.
    """
    for name, path in inputs.items():
        if path is not None and target.exists() and path.exists() and target.samefile(path):
            raise RecipeError(f"{flag} {target} would overwrite {name}.", hint="Choose another file.")


def check_no_weights(flag: str, target: Path) -> None:
    """Check that an output file that holds no weights is not named like one that does.

    Raises:
        RecipeError: its name ends in .safetensors.
    """
    if target.suffix == SUFFIX:
        raise RecipeError(f"{flag} {target}: files named *{SUFFIX} hold weights.", hint="Choose another file name.")
