"""Print pip constraints for `make check-oldest`: the oldest torch and timm that are supported.

Of the other dependencies pip takes what goes with them: their bounds are older than some test tools
allow.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PINNED = ("torch", "torchvision", "timm")


def constraints(project: dict[str, Any]) -> Iterator[str]:
    """`name==bound`, of each of `PINNED`; a bound like 2.9 allows its patches.

    Args:
        project: the table of that name.
    """
    for requirement in project["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement} has no lower bound")
        name, bound = found.groups()
        if name in PINNED:
            yield f"{name}=={bound}.*" if bound.count(".") == 1 else f"{name}=={bound}"


if __name__ == "__main__":
    for line in constraints(tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]):
        sys.stdout.write(line + "\n")
