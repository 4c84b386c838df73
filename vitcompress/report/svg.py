"""Draw with matplotlib, and put drawings into an HTML page, in the page's colors.

matplotlib is imported when something is drawn, not before.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SVG_LINK = "{http://www.w3.org/1999/xlink}href"
_CSS_COLORS = {  # colors of the drawings, and their names in style.css.j2
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    "#e0e0e0": "var(--line)",
    "#d55e00": "var(--student)",
    "#0072b2": "var(--baseline)",
    "#009e73": "var(--third)",
    "#cc79a7": "var(--fourth)",
    "#a66f00": "var(--fifth)",
    "#56b4e9": "var(--sixth)",
}
_COLOR = re.compile("|".join(_CSS_COLORS))


def draw_svg(size: tuple[float, float], plot: Callable[[Axes], None]) -> str:
    """Draw on axes with a light grid.

    Args:
        size: width and height in inches, at 72 dots per inch.
        plot: draws on the axes, in place.

    Returns:
        SVG; the same for the same plot and the same matplotlib.
    """
    return draw_panels(size, [plot])


def draw_panels(size: tuple[float, float], plots: Sequence[Callable[[Axes], None]]) -> str:
    """Draw on axes side by side, with a common vertical axis and light grids.

    Args:
        size: width and height of the whole in inches, at 72 dots per inch.
        plots: each draws on one of the axes, in place.

    Returns:
        SVG; the same for the same plots and the same matplotlib.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    svg = io.StringIO()
    # a user's matplotlibrc must not change the drawing, nor may random ids or the date
    with matplotlib.style.context(["default", {"svg.hashsalt": "vitcompress"}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in other scripts are shown as boxes
        figure = Figure(figsize=size, dpi=72, layout="constrained")
        panels = figure.subplots(1, len(plots), sharey=True, squeeze=False)[0]
        for axes, plot in zip(panels, plots, strict=True):
            plot(axes)
            axes.grid(color="#e0e0e0", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def inline_svg(svg: str, key: str, title: str, description: str) -> str:
    """Return a drawing as an `<svg>` element that is safe to put into HTML.

    Args:
        svg: file written by matplotlib.
        key: prefix that makes the drawing's ids unique on the page.
        title: short name of the drawing.
        description: what the drawing shows, in words and numbers.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.rpartition("}")[2] in ("metadata", "style", "title")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespace
        element.attrib = {
            "href" if name == _SVG_LINK else name: _convert_attribute(name, value, key)
            for name, value in element.attrib.items()
        }
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


def _convert_attribute(name: str, value: str, key: str) -> str:
    """Return an attribute's value with the page's colors and with unique ids."""
    if name == "id":
        return f"{key}-{value}"
    if name == _SVG_LINK:
        return value.replace("#", f"#{key}-", 1)
    if name == "style":
        return _COLOR.sub(lambda match: _CSS_COLORS[match[0]], value)
    return value.replace("url(#", f"url(#{key}-")
