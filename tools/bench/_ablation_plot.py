"""The picture of an ablation: a dot for each seed, a bar for their mean, best row first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmkd_scale.files import write_atomically
from cmkd_scale.monitoring.report_style import COLOURS, GRID, INK, make_figure, styled, to_png
from tools.bench._ablation_rows import REFERENCE, SHIFTED

_ROW = 0.21  # inches
_MARGIN = 0.6
_CONTROLS = ("ce_ls", f"{REFERENCE}/permuted")


def write_plot(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw the rows that there are, those with shifted labels in a panel of their own.

    Args:
        rows: name -> ``mean``, ``seeds`` (both parts of 1).
        file: PNG, 1000 pixels wide.

    Raises:
        UsageError: matplotlib is not installed.
    """
    usual = {name: row for name, row in rows.items() if not name.endswith(SHIFTED)}
    shifted = {
        name.removesuffix(SHIFTED): row for name, row in rows.items() if name.endswith(SHIFTED)
    }
    panels = [(title, part) for title, part in _titled(usual, shifted) if part]
    with styled():
        figure, axes = make_figure(_MARGIN * len(panels) + _ROW * len(rows), len(panels))
        grid = axes[0].get_gridspec()
        if grid is not None:
            grid.set_height_ratios([len(part) for _, part in panels])
        highest = max(max(row["seeds"].values()) for row in rows.values())
        for ax, (title, part) in zip(axes, panels, strict=True):
            _panel(ax, title, part)
            ax.set_xlim(0, 100 * highest + 2)
        explained = "test accuracy, %; dots are seeds, bars means, the line is that of ucmkd_global"
        figure.supxlabel(explained, fontsize=9)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_png(figure))


def _titled(usual: Mapping[str, Any], shifted: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [("3 clips of each class", usual), ("1 to 10 clips of a class", shifted)]


def _panel(ax: Any, title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    names = sorted(rows, key=lambda name: float(rows[name]["mean"]))
    reference = rows.get(REFERENCE)
    if reference is not None:
        ax.axvline(100 * reference["mean"], color=GRID, linewidth=1.2, zorder=0)
    for place, name in enumerate(names):
        colour = COLOURS[1] if name in (REFERENCE, f"{REFERENCE} again") else COLOURS[0]
        if name in _CONTROLS:
            colour = COLOURS[4]
        values = [100 * value for value in rows[name]["seeds"].values()]
        ax.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.75, mew=0)
        ax.plot([100 * rows[name]["mean"]], [place], "|", color=INK, markersize=9, mew=1.6)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_title(title, loc="left", fontsize=9, color=INK)
