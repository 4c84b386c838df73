"""Make the pages that docs/ does not hold: home, and the commands and Python from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import vitcompress
from vitcompress.cli.app import app

README = Path(__file__).parents[1] / "README.md"
MORE = ("vitcompress.export.export", "vitcompress.report.Report", "vitcompress.recipe.Recipe")  # modules of their own


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as GitHub does, where the same pages are read."""
    config.mdx_configs["toc"]["slugify"] = github_slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {"index.md": home(), "commands.md": "\n".join(commands()), "python.md": "\n".join(python())}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def github_slug(text: str, separator: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", separator)


def home() -> str:
    """Return the README with links as seen from docs/; other files are named, not linked."""
    text = README.read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^]]+)\]\((?:vitcompress|tests)/([^)]+)\)", r"\1", text)


def commands() -> Iterator[str]:
    """A section per command, with its arguments and options."""
    yield "# Commands\n\nAs `vitcompress COMMAND --help` has them; made from the same code.\n"
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from section(f"vitcompress {name}", command)
        for below, each in getattr(command, "commands", {}).items():
            yield from section(f"vitcompress {name} {below}", each)


def section(name: str, command: Any) -> Iterator[str]:
    """One command: what it does, and a table of its options for each of their stages."""
    yield f"## {name}\n\n{inspect.cleandoc(command.help or '')}\n"
    panels: dict[str, list[str]] = {}
    with command.make_context(name, [], resilient_parsing=True) as context:
        for parameter in command.params:
            if parameter.name != "help":
                words, meaning = parameter.get_help_record(context)
                # in a span of code no backslash hides a bar from the table
                cells = [f"<code>{escape(words)}</code>", " ".join(meaning.split())]
                cells = [cell.replace("|", "&#124;") for cell in cells]
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(" | ".join(cells))
    for panel, rows in sorted(panels.items()):
        yield f"| {panel or 'of the command'} | |\n|---|---|"
        yield from (f"| {row} |" for row in rows)
        yield ""


def python() -> Iterator[str]:
    """What can be imported, by its docstrings."""
    yield "# Python\n"
    named = [f"vitcompress.{vitcompress._HOME[name]}.{name}" for name in sorted(vitcompress._HOME)]
    for name in dict.fromkeys([*named, *MORE]):
        yield f"::: {name}\n"
