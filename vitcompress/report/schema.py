"""Write the JSON Schema of a report from the dataclasses.

`python -m vitcompress.report.schema` writes `schema.json`, which is published with the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitcompress.report.model import SCHEMA_VERSION, Report, adapter

PATH = Path(__file__).with_suffix(".json")


def report_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a report; it allows additional fields."""
    schema = _allow_fields(adapter(Report).json_schema(mode="serialization"))
    schema["properties"]["schema_version"]["const"] = SCHEMA_VERSION
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def to_text() -> str:
    """Return the text of `schema.json`."""
    return json.dumps(report_schema(), indent=2, ensure_ascii=False) + "\n"


def _allow_fields(tree: Any) -> Any:
    """Return a schema that allows further fields: some may be added within one `schema_version`."""
    if isinstance(tree, list):
        return [_allow_fields(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: _allow_fields(item) for key, item in tree.items() if (key, item) != ("additionalProperties", False)}


if __name__ == "__main__":
    PATH.write_text(to_text(), encoding="utf-8")
