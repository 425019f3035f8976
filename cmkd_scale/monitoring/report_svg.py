"""Pictures as SVG inside the page: sharp at any size, and light or dark as the page is.

matplotlib writes a document of its own. Within a page its names must not clash, its style
sheet must not reach beyond it, and its colours give way to variables of the page.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from cmkd_scale.monitoring.report_style import AXIS, COLOURS, GRID, INK, PAPER, SOFT, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK = {
    PAPER: "#1d2126",
    INK: "#e4e7eb",
    SOFT: "#9aa3ad",
    AXIS: "#69727c",
    GRID: "#333a42",
    **{colour: colour for colour in COLOURS},
    # Too dark to stand out from dark paper.
    "#3f90da": "#57a3e8",
    "#bd1f01": "#ef6a50",
    "#832db6": "#bb80e2",
    "#a96b59": "#c78b79",
    "#717581": "#9298a4",
    # Bands that other marks lie on.
    "#e7c9c4": "#64453f",
    "#c9ced4": "#4d555e",
}
"""Colour of a picture on white paper -> the one on dark paper."""

_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([\w.-]+)")
_COLOUR = re.compile("|".join(DARK), re.IGNORECASE)


@dataclass(frozen=True)
class Drawing:
    """One figure, twice."""

    png: bytes
    """For a file: on white paper."""
    svg: str
    """For the page."""


def draw(figure: Figure) -> Drawing:
    """Encode a figure; equal figures give equal bytes."""
    return Drawing(to_png(figure), to_svg(figure))


def variable(colour: str) -> str:
    """Name of the page's variable for a colour of ``DARK``."""
    return f"--p{colour.removeprefix('#').lower()}"


def to_svg(figure: Figure) -> str:
    """An ``<svg>`` element for a page that defines the variables; equal figures, equal text.

    Text is escaped: whatever a label says, it is no markup.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    used = {
        name
        for element in root.iter()
        for key, value in element.attrib.items()
        if key.endswith("href") or value.startswith("url(")
        for name in _REFERENCE.findall(value)
    }
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        # Names that are left are digests of what they name: a second one is the same thing.
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib = {key: _attribute(key, value) for key, value in attributes.items()}
    # What the style sheet said of everything; the page gives the size.
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str) -> str:
    """An attribute in fewer digits and in the page's colours and font."""
    if key == "href":
        return value.replace("\n", "")
    if key == "style":
        kept = (part for part in value.split("; ") if not part.startswith("font-family"))
        return _COLOUR.sub(lambda match: f"var({variable(match[0])})", "; ".join(kept))
    return _NUMBER.sub(lambda match: f"{float(match[0]):.2f}", value.replace("\n", ""))
