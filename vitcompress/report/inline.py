"""How does a drawing of matplotlib's stand in a page?  In the page's colours, with a title and a description."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
COLOURS = {  # what the drawings are drawn in, and what the page's style sheet calls it
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#e0e0e0": "var(--line)",
    "#909090": "var(--faint)",
    "#d55e00": "var(--student)",
    "#0072b2": "var(--baseline)",
    "#009e73": "var(--third)",
    "#cc79a7": "var(--fourth)",
    "#a66f00": "var(--fifth)",
    "#56b4e9": "var(--sixth)",
}
_COLOUR = re.compile("|".join(COLOURS))


def inline_svg(svg: str, key: str, title: str, description: str) -> str:
    """Make an SVG file part of a page.

    Args:
        svg: as matplotlib writes it.
        key: sets its ids apart from those of the page's other drawings.
        title: its name.
        description: what it shows, in words and numbers.

    Returns:
        An `<svg>` element, safe to be put into HTML.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.rpartition("}")[2] in ("metadata", "style", "title")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML knows the namespace
        element.attrib = {_plain(name): _own(name, value, key) for name, value in element.attrib.items()}
    height, width = root.attrib.pop("height"), root.attrib.pop("width")
    root.attrib |= {
        "role": "img", "aria-labelledby": f"{key}-title {key}-text", "class": "chart", "fill": "currentColor",
        "style": f"aspect-ratio: {float(width[:-2]):g} / {float(height[:-2]):g}",
    }  # fmt: skip
    for name, tag, text in (("text", "desc", description), ("title", "title", title)):
        element = ElementTree.Element(tag, {"id": f"{key}-{name}"})
        element.text = text
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def _plain(name: str) -> str:
    return "href" if name == _LINK else name


def _own(name: str, value: str, key: str) -> str:
    """An attribute with the page's colours, and with ids that no other drawing has."""
    if name == "id":
        return f"{key}-{value}"
    if name == _LINK:
        return value.replace("#", f"#{key}-", 1)
    if name == "style":
        return _COLOUR.sub(lambda found: COLOURS[found[0]], value)
    return value.replace("url(#", f"url(#{key}-")
