"""Which JSON is a report?  A JSON Schema, written from the dataclasses and published with the package.

`python -m vitcompress.report.schema` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from vitcompress.report.model import SCHEMA_VERSION, Report

PATH = Path(__file__).with_suffix(".json")


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what `to_json` gives; fields that a later version adds are let through."""
    schema = _open(TypeAdapter(Report).json_schema(mode="serialization"))
    schema["properties"]["schema_version"]["const"] = SCHEMA_VERSION
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _open(tree: Any) -> Any:
    """A schema that forbids no further fields: within a `schema_version` some may be added."""
    if isinstance(tree, list):
        return [_open(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _open(each) for key, each in tree.items() if (key, each) != ("additionalProperties", False)}


def to_text() -> str:
    """The schema as its file has it."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(to_text(), encoding="utf-8")
