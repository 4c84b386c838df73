"""Files of JSON lines: each run adds one, so that an interrupted benchmark can continue."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LineT = TypeVar("LineT", bound="DataclassInstance")


def add_line(path: Path, line: DataclassInstance) -> None:
    """Add a line to a file; its folder is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def read_lines(path: Path, kind: type[LineT]) -> list[LineT]:
    """Return the lines of a file; none where there is no file."""
    if not path.exists():
        return []
    adapter = TypeAdapter(kind)
    return [adapter.validate_json(text) for text in path.read_text(encoding="utf-8").splitlines()]
