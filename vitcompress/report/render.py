"""Render the report's jinja2 templates.

jinja2 is imported when a template is rendered, not before.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Render a template; every value is escaped in HTML, and none is in Markdown (see `cell`).

    Args:
        template: file name in `templates/`.
        values: variables of the template.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("vitcompress.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=select_autoescape(("html.j2", "css.j2"), default=True, disabled_extensions=("md.j2",)),
    )  # fmt: skip
    environment.filters["cell"] = cell
    return environment


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table: one line, without markup or HTML."""
    plain = text.replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"[\\`\[\]!|]", r"\\\g<0>", plain).split())
