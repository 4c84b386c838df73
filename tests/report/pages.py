"""Read pages of HTML."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Seen(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def assert_safe(html: str) -> None:
    """Nothing is run, nothing is fetched, and there are no two elements of one id."""
    seen = Seen(html)
    allowed = {
        "html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "p", "ul", "li", "dl", "dt", "dd",
        "div", "span", "small", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre", "code", "img",
        "svg", "g", "path", "defs", "use", "clippath", "rect", "desc", "br",
    }  # fmt: skip
    assert {tag for tag, _ in seen.tags} <= allowed
    for _, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"#|data:", attributes.get(name) or "#")
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert re.search(r"url\((?!#)", html) is None


def shown_by_chromium(html: str, folder: Path) -> str:
    """What Chromium makes of a page; it shows something, and says nothing on its console."""
    page, picture = folder / "page.html", folder / "page.png"
    page.write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    ended = subprocess.run(
        [str(CHROMIUM), *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in ended.stderr
    subprocess.run(
        [str(CHROMIUM), *flags, "--window-size=500,900", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 10_000  # an empty one takes 3 kB
    return ended.stdout
