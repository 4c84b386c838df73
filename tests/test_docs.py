"""Every command that the documentation shows can be typed."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from vitcompress.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        command
        for page in PAGES
        for command in re.findall(r"^\s*(?:\$ )?(vitcompress [a-z].*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_parses(command: str) -> None:
    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    with group.make_context("vitcompress", words[:1], resilient_parsing=True) as root:
        sub = group.get_command(root, words[0])  # type: ignore[attr-defined]
        assert sub is not None, words[0]
        sub.make_context(words[0], words[1:], parent=root)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z][a-z-]*)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
