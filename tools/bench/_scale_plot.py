"""The picture of ``scale.py``: classes, prototypes and ranks, a panel each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.bench._bench import Rows

_BLUE, _ORANGE, _GREEN, _GREY = "#1f4e79", "#c55a11", "#3a7d44", "#7f7f7f"
_WAYS = {"class-masked": _BLUE, "label-free, all": _ORANGE, "label-free, search": _GREEN}
_AMORTISED = {"label-free, search": "amortised_cpu_milliseconds"}
_SHADES = (_BLUE, _GREEN, _ORANGE)


def plot(file: Path, tables: dict[str, Rows], build: Rows) -> None:
    """Draw the tables, and seconds of building a memory if there are any.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 5.4))
    _classes(axes[0], tables["classes"], build)
    _prototypes(axes[1], {n: t for n, t in tables.items() if n.endswith(" prototypes")})
    _ranks(axes[2], {n: t for n, t in tables.items() if n.endswith(" ranks")})
    for axis in axes:
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.minorticks_off()
        axis.set_ylabel("CPU milliseconds a step")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.tight_layout(w_pad=2.5)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def number(name: str) -> int:
    """The number that a row's or a table's name begins with."""
    return int(name.split()[0].replace(",", ""))


def _classes(axis: Any, rows: Rows, build: Rows) -> None:
    lines = {
        "": ("alignment, all terms", _BLUE),
        ", transport alone": ("its transport alone", _GREEN),
        ", cross-entropy head": ("the head's own cross-entropy", _ORANGE),
    }
    for end, (label, colour) in lines.items():
        found = {name: row for name, row in rows.items() if name.endswith(f"classes{end}")}
        _line(axis, found, "cpu_milliseconds", label, colour)
    _unit(axis, rows, "a cross-entropy step, 100 classes")
    if build:
        built = {name: row for name, row in build.items() if name.endswith("classes")}
        _line(axis, built, "seconds", "building a memory of width 1,024, once: seconds", _GREY)
    axis.set_xscale("log")
    axis.set_xticks([number(name) for name in rows if name.endswith("classes")])
    axis.set_title("Terms over all classes grow with classes", fontsize=11)
    axis.set_xlabel("classes, 16 prototypes each")


def _prototypes(axis: Any, tables: dict[str, Rows]) -> None:
    for way, colour in _WAYS.items():
        rows = {name: table[way] for name, table in tables.items()}
        label = f"{way} of 64, epsilon 0.02" if way in _AMORTISED else way
        _line(axis, rows, _AMORTISED.get(way, "cpu_milliseconds"), label, colour)
    first = next(iter(tables.values()))
    _unit(axis, first, "a cross-entropy step")
    axis.set_xscale("log")
    axis.set_xticks([number(name) for name in tables])
    axis.set_title("A search makes a million prototypes affordable", fontsize=11)
    axis.set_xlabel("prototypes of 100 classes")


def _ranks(axis: Any, tables: dict[str, Rows]) -> None:
    last = list(tables.values())[-1]
    sizes = [name for name in last if name.endswith("prototypes")]
    for size, colour in zip(sizes, _SHADES, strict=False):
        rows = {name: table[size] for name, table in tables.items()}
        share = last[size]["bytes_of_gradients"]
        label = f"{size}: {share:.1%} of the gradients' bytes"
        _line(axis, rows, "cpu_milliseconds", label, colour)
    units = {name: table["ce_ls"] for name, table in tables.items()}
    _line(axis, units, "cpu_milliseconds", "the rank's cross-entropy step", _GREY)
    axis.set_xscale("log", base=2)
    axis.set_xticks([number(name) for name in tables])
    axis.set_title("Ranks divide little of alignment, and send little", fontsize=11)
    axis.set_xlabel("ranks, global batch of 64")


def _line(axis: Any, rows: Rows, column: str, label: str, colour: str) -> None:
    style = "s--" if colour == _GREY else "o-"
    values = [row[column] for row in rows.values()]
    axis.plot([number(name) for name in rows], values, style, color=colour, label=label)


def _unit(axis: Any, rows: Rows, label: str) -> None:
    axis.axhline(rows["ce_ls"]["cpu_milliseconds"], color="black", linestyle=":", label=label)
