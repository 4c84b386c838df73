"""The layout of docs/explanation.md holds: values go one way through the stages, and no stage reaches back."""

import ast
import re
from pathlib import Path

import pytest

import vitcompress

PACKAGE = Path(vitcompress.__file__).parent
EXPLANATION = (Path(__file__).parents[1] / "docs" / "explanation.md").read_text(encoding="utf-8")
LAYOUT = EXPLANATION.partition("## How the code is laid out")[2]
STAGES = tuple(", ".join(re.findall(r"^\| .* \| (\w.*) \|$", LAYOUT, re.MULTILINE)[1:]).split(", "))
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.stem.startswith("__")]


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitcompress":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} & set(STAGES)
    return found


def test_every_module_is_a_stage() -> None:
    assert {stage_of(path) for path in FILES} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_stage_imports_only_earlier_ones(path: Path) -> None:
    own = STAGES.index(stage_of(path))
    assert [name for name in imported_stages(path) if STAGES.index(name) > own] == []


def test_only_the_command_line_prints_and_exits() -> None:
    for path in FILES:
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert "print" not in names, path
        if stage_of(path) not in ("cli", "endings", "flags", "bundled", "launch"):
            assert not {"sys", "SystemExit", "typer"} & names, path
