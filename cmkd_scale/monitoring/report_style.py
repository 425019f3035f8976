"""How the report's pictures look: colours, text, legend; matplotlib without pyplot.

Colours are from Petroff (2021, arXiv 2107.02270), chosen to stay apart for colour-blind
eyes; a teacher control shares its method's colour and differs by dashes and hollow marks.
Pictures are 5 inches wide with 9-point text, which stays legible on a telephone. The files
beside the page are PNG; the page holds SVG (``report_svg``), whose colours follow its own.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring.report_runs import CONTROLS, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#3f90da", "#bd1f01", "#ffa90e", "#832db6", "#94a4a2",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
_GREY = "#717581"
INK = "#22262b"
SOFT = "#5b636d"
GRID = "#e3e6ea"
AXIS = "#9aa1a9"
PAPER = "#ffffff"
GAIN, LOSS = COLOURS[0], COLOURS[1]
MARKERS = ("o", "s", "^")
_WIDTH = 5.0  # inches
_DPI = 200

_RC: dict[Any, Any] = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.axisbelow": True,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a class name is a dollar
    "svg.fonttype": "none",  # text stays text: the reader's fonts know more scripts
    "svg.hashsalt": "cmkd",  # equal figures give equal names within them
    "xtick.color": AXIS,
    "xtick.labelcolor": INK,
    "ytick.color": AXIS,
    "ytick.labelcolor": INK,
}


@contextmanager
def styled() -> Iterator[None]:
    """Hold the report's look while a picture is made, whatever the user's matplotlibrc says.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "The report needs matplotlib, which is not installed: pip install 'cmkd_scale[report]'"
        ) from None
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A class name in a script that the font lacks shows as boxes; the tables have it right.
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


def method_colours(groups: Sequence[Group]) -> dict[str, str]:
    """Colour of each method; controls of a method share its colour, those without are grey."""
    bases = sorted({group.method.partition("/")[0] for group in groups} - set(CONTROLS))
    colours = dict(zip(bases, cycle(c for c in COLOURS if c != _GREY), strict=False))
    return {group.method: colours.get(group.method.partition("/")[0], _GREY) for group in groups}


def method_lines(groups: Sequence[Group]) -> dict[str, str]:
    """Line of each method: dashes mean a control; where colours come again, dots tell apart."""
    bases = sorted({group.method.partition("/")[0] for group in groups} - set(CONTROLS))
    rounds = {base: place // (len(COLOURS) - 1) for place, base in enumerate(bases)}
    lines = ("-", ":", "-.")
    return {
        group.method: "--" if is_dashed(group.method) else lines[rounds.get(group.method, 0) % 3]
        for group in groups
    }


def is_dashed(method: str) -> bool:
    """Whether a method is drawn hollow and dashed: a control with a teacher, or plain ``ce``."""
    return "/" in method or method in CONTROLS[1:]


def short(name: str, limit: int = 24) -> str:
    """Return ``name`` fit for a label: printable, not too long, never empty."""
    shown = "".join(c if c.isprintable() else "?" for c in name).strip() or "?"
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def make_figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``height`` inches with ``rows`` panels above each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]


def legend_height(names: Sequence[str]) -> float:
    """Inches that a legend of these names takes below the panels."""
    return 0.19 * math.ceil(len(names) / _columns(names)) + 0.1


def add_legend(figure: Figure, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a legend below the panels: label -> look of its line or mark."""
    from matplotlib.lines import Line2D

    # Before 3.10 matplotlib hides a label that starts with an underscore.
    handles = [Line2D([], [], label=f" {short(name)}", **look) for name, look in entries.items()]
    columns = _columns(list(entries))
    # matplotlib fills columns first; people read rows first.
    by_column = [handle for i in range(columns) for handle in handles[i::columns]]
    figure.legend(
        handles=by_column,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.4,
    )


def _columns(names: Sequence[str]) -> int:
    longest = max(len(short(name)) for name in names)
    return max(1, min(len(names), 60 // (longest + 6)))


def to_png(figure: Figure) -> bytes:
    """Encode a figure; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
