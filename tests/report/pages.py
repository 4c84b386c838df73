"""Read pages of HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser


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
