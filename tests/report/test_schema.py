"""The published schema is that of the code, and lets through what commands print."""

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tests.conftest import Vitcompress
from tests.report.samples import REPORT, UNLABELLED
from vitcompress.report import schema
from vitcompress.report.model import to_json

SCHEMA = json.loads(files("vitcompress").joinpath("report/schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_published_file_is_current() -> None:
    text = schema.PATH.read_text(encoding="utf-8")
    assert text == schema.to_text(), "python -m vitcompress.report.schema writes it anew"
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("report", [REPORT, UNLABELLED, replace(REPORT, accuracy=None)])
def test_reports_are_of_it(report: object) -> None:
    VALIDATOR.validate(json.loads(json.dumps(to_json(report))))


def test_what_the_commands_give_is_of_it(vitcompress: Vitcompress, made: Path) -> None:
    VALIDATOR.validate(json.loads(vitcompress("report", made / "mini.safetensors", "--json").out))
    VALIDATOR.validate(json.loads((made / "mini.report.json").read_text(encoding="utf-8")))


def test_what_is_none() -> None:
    tree = json.loads(json.dumps(to_json(REPORT)))
    assert not VALIDATOR.is_valid({**tree, "schema_version": 2})
    assert not VALIDATOR.is_valid({**tree, "groups": "5,5,2"})
    assert not VALIDATOR.is_valid({key: value for key, value in tree.items() if key != "size"})
    assert VALIDATOR.is_valid({**tree, "added_later": 1})


def test_every_field_is_in_the_reference() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert set(SCHEMA["properties"]) <= named
