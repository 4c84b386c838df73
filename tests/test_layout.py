"""Packages import only earlier ones, in the order of docs/explanation.md."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitcompress

PACKAGE = Path(vitcompress.__file__).parent
EXPLANATION = (Path(__file__).parents[1] / "docs" / "explanation.md").read_text(encoding="utf-8")
LAYOUT = EXPLANATION.partition("## How the code is laid out")[2]
STAGES = tuple(
    name for row in re.findall(r"^\| (`.*?) \|", LAYOUT, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
)
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or not path.stem.startswith("__")]


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """The dotted names of the modules that a file imports of the package, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vitcompress":
            for alias in node.names:
                inner = PACKAGE.joinpath(*node.module.split(".")[1:], alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found - {"vitcompress"}


def test_every_package_is_in_the_table() -> None:
    assert {stage_of(path) for path in FILES} == set(STAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_earlier_ones(path: Path) -> None:
    own = STAGES.index(stage_of(path))
    assert [name for name in imported_modules(path) if STAGES.index(name.split(".")[1]) > own] == []


def test_no_modules_import_each_other() -> None:
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    graph = {name.removesuffix(".__init__"): imported_modules(path) for path, name in names.items()}
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError


def test_only_the_command_line_prints_and_exits() -> None:
    for path in FILES:
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert "print" not in names, path
        if stage_of(path) not in ("cli", "bundled", "runtime"):
            assert not {"sys", "SystemExit", "typer"} & names, path
