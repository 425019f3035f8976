"""The picture of ``accuracy.py``: all methods beside each other, and what a teacher is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmkd_scale.errors import UsageError
from cmkd_scale.files import write_atomically
from cmkd_scale.monitoring.report_style import COLOURS, GRID, INK, make_figure, styled, to_png
from tools.bench._accuracy_tables import Table, curve_of, reading, reading_text
from tools.bench._accuracy_tasks import BASELINE, MAIN, OURS

_ROW = 0.19  # inches
_CURVE = 2.7
_MARGIN = 0.6
_GREY = COLOURS[4]


def write_plot(tables: Mapping[str, Table], file: Path) -> None:
    """Draw the largest table from pictures to speech, and below it the label-efficiency curve.

    Args:
        tables: as ``read_table`` makes them; a panel without data is left out.
        file: PNG, 1000 pixels wide.

    Raises:
        UsageError: no table has rows, or matplotlib is not installed.
    """
    table, curve = main_table(tables), curve_of(tables)
    if table is None:
        raise UsageError(f"{file}: no student is finished, so there is nothing to draw.")
    panels = [_ROW * len(table["rows"]) + 0.2, *([_CURVE] if len(curve) > 1 else [])]
    with styled():
        figure, axes = make_figure(sum(panels) + _MARGIN * len(panels), len(panels))
        grid = axes[0].get_gridspec()
        if grid is not None:
            grid.set_height_ratios(panels)
        _dots(axes[0], table)
        if len(curve) > 1:
            _curve(axes[1], curve)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_png(figure))


def main_table(tables: Mapping[str, Table]) -> Table | None:
    """The table with most rows, one from pictures to speech first; None without any."""
    filled = [table for table in tables.values() if table["rows"]]
    usual = [table for table in filled if table["suite"] == "numbers"]
    usual = [table for table in usual if table["direction"] == MAIN]
    return max(usual or filled, key=lambda table: len(table["rows"]), default=None)


def _dots(ax: Any, table: Table) -> None:
    rows = table["rows"]
    names = sorted(rows, key=lambda name: float(rows[name]["mean"]))
    baseline = rows.get(BASELINE)
    if baseline is not None:
        ax.axvline(100 * baseline["mean"], color=_GREY, linewidth=1, dashes=(3, 2), zorder=0)
    for place, name in enumerate(names):
        colour = COLOURS[1] if name == OURS else _GREY if rows[name]["control"] else COLOURS[0]
        values = [100 * value for value in rows[name]["seeds"].values()]
        ax.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.7, mew=0)
        ax.plot([100 * rows[name]["mean"]], [place], "|", color=INK, markersize=9, mew=1.6)
    ax.set_yticks(range(len(names)), names)
    for label, name in zip(ax.get_yticklabels(), names, strict=True):
        if rows[name]["control"]:
            label.set_color("#717581")
        if name == OURS:
            label.set_fontweight("bold")
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(left=0)
    ax.tick_params(length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    # Names take half of the width: a title is broken, and begins where they do.
    ax.set_title(table["title"].replace(": ", ":\n", 1), loc="left", fontsize=9, color=INK)
    shown = "test accuracy, %\ndots: seeds, bar: mean, grey: control"
    ax.set_xlabel(shown if baseline is None else f"{shown},\ndashed: {BASELINE}")


def _curve(ax: Any, curve: Mapping[int, Mapping[str, Any]]) -> None:
    shots = list(curve)
    for name, colour, label in ((BASELINE, "#717581", "no teacher"), (OURS, COLOURS[1], "teacher")):
        means = [100 * curve[count][name]["mean"] for count in shots]
        ax.plot(shots, means, "-", color=colour, linewidth=1.6)
        for count in shots:
            values = [100 * value for value in curve[count][name]["seeds"].values()]
            ax.plot([count] * len(values), values, "o", color=colour, ms=4, alpha=0.5, mew=0)
        ax.annotate(
            label, (shots[-1], means[-1]), (7, 0), textcoords="offset points", color=colour,
            va="center", annotation_clip=False,
        )  # fmt: skip
    few, needed = reading(curve)
    height = 100 * float(curve[few][OURS]["mean"])
    end = shots[-1] if needed is None else needed
    ax.plot([few, end], [height, height], color=INK, linewidth=1, dashes=(2, 2))
    if needed is not None:
        ax.plot([end, end], [0, height], color=INK, linewidth=1, dashes=(2, 2))
    ax.set_title(reading_text(curve), loc="left", fontsize=9, color=INK)
    ax.set_xscale("log")
    ax.set_xticks(shots, [str(count) for count in shots])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", color=GRID, linewidth=0.5)
    ax.set_xlabel("labels a class (logarithmic)")
    ax.set_ylabel("test accuracy, %")
