"""The site builds without a warning, has every command, and fetches nothing from others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from vitcompress.cli.app import app

ROOT = Path(__file__).parents[1]
pytest.importorskip("material", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder))
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix(".html").as_posix() for path in docs.rglob("*.md")}
    pages = {page.replace("README", "index") for page in pages} | {"index.html", "commands.html", "python.html"}
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.html")} == pages | {"404.html"}
    assert not list(site.rglob("*.py"))


def test_the_commands_are_those_of_the_program(site: Path) -> None:
    text = (site / "commands.html").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f'id="vitcompress-{name}"' in text
    for flag in ("--target-ratio", "--log-json", "--max-drop"):
        assert flag in text


def test_python_is_there_with_its_docstrings(site: Path) -> None:
    text = (site / "python.html").read_text(encoding="utf-8")
    for name in (
        "pipeline.compress.compress",
        "artifact.load.load",
        "pipeline.finetune.finetune",
        "export.export",
        "report.Report",
    ):
        assert f'id="vitcompress.{name}"' in text
    assert "raised before any weight is loaded" in text


def test_tables_and_lists_are_made_of_what_is_written_as_one(site: Path) -> None:
    """Where no blank line is before one, it is a paragraph here, though not on GitHub."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"\|---|<p>[^<]*\n- ", text) == [], page.name
        assert re.findall(r"<code>[^<]*\\\|", text) == [], page.name


def test_nothing_is_fetched_from_others(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r'<(?:script|img|iframe)[^>]*src="(?:https?:)?//[^"]*"', text) == [], page.name
        assert re.findall(r'<link[^>]*href="https?://[^"]*"[^>]*rel="stylesheet"|fonts\.googleapis', text) == []
