"""May this be written over?  Never what a command reads, and of what is there already only what is of the same kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vitcompress.errors import RecipeError

SUFFIX = ".safetensors"


def check_apart(flag: str, target: Path, inputs: Mapping[str, Path | None]) -> None:
    """Make sure that what is written is none of what is read.

    Args:
        flag: that named the target.
        target: where to write.
        inputs: what is read, by what the user calls it.

    Raises:
        RecipeError: it is.
    """
    for name, path in inputs.items():
        if path is not None and target.exists() and path.exists() and target.samefile(path):
            raise RecipeError(f"{flag} {target} would overwrite {name}.", hint="Name another file.")


def check_no_weights(flag: str, target: Path) -> None:
    """Make sure that what is no file of weights does not take the name of one.

    Raises:
        RecipeError: it would.
    """
    if target.suffix == SUFFIX:
        raise RecipeError(f"{flag} {target}: a file of that name holds weights.", hint="Name another file.")
