"""The report's pictures of runs, classes and features.

Shapes: N test samples, C classes, J prototypes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.monitoring.report_analysis import Plane
from cmkd_scale.monitoring.report_runs import Group, number
from cmkd_scale.monitoring.report_style import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    PAPER,
    add_legend,
    is_dashed,
    legend_height,
    make_figure,
    method_colours,
    method_lines,
    short,
    styled,
)
from cmkd_scale.monitoring.report_svg import Drawing, draw

_HEAT = "#2a7bc8"
_NAMED = 20
"""Groups that a map names where they lie; more are in a legend."""
_DOTS = 1500
"""Test features that a map draws at most."""


def thinned(features: int) -> int:
    """Of so many test features a map draws every which one."""
    return max(1, math.ceil(features / _DOTS))


@styled()
def accuracy_plot(groups: Sequence[Group]) -> Drawing:
    """Test accuracy by method: every run a point, the mean a bar, its value beside it."""
    scored = [group for group in groups if group.accuracies]
    figure, [axes] = make_figure(0.42 * len(scored) + 0.95)
    colours = method_colours(groups)
    for row, group in enumerate(scored):
        colour, hollow = colours[group.method], is_dashed(group.method)
        points = [100 * value for value in group.accuracies]
        face = PAPER if hollow else colour
        axes.scatter(
            points, [row] * len(points), s=34, facecolor=face, edgecolor=colour, zorder=3, alpha=0.9
        )
        mean = statistics.fmean(points)
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color=INK, linewidth=1.6, zorder=4)
        axes.annotate(
            f"{mean:.1f}", (max(points), row), (7, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(scored)), [short(group.method) for group in scored])
    axes.set_ylim(len(scored) - 0.4, -0.6)
    highest = max(value for group in scored for value in group.accuracies)
    axes.set_xlim(0, 100 * highest * 1.12 + 1)
    axes.set_xlabel("test accuracy (%)")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    return draw(figure)


@styled()
def curves_plot(groups: Sequence[Group], panels: Mapping[str, str]) -> Drawing:
    """Logged values against the step: thin lines for runs, a thick one for their mean.

    Args:
        groups: the methods.
        panels: key of a logged step -> label of the axis, one panel each.
    """
    names = [group.method for group in groups]
    figure, grid = make_figure(2.4 * len(panels) + 0.3 + legend_height(names), len(panels))
    colours, lines = method_colours(groups), method_lines(groups)
    for axes, (key, label) in zip(grid, panels.items(), strict=True):
        for group in groups:
            curves = [curve for run in group.runs if (curve := _curve(run.steps, key))]
            if not curves:
                continue
            colour = colours[group.method]
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(*_xy(curve), color=colour, linewidth=0.6, alpha=0.45)
            common = set.intersection(*(set(curve) for curve in curves))
            mean = {
                step: statistics.fmean(curve[step] for curve in curves) for step in sorted(common)
            }
            axes.plot(*_xy(mean), color=colour, linewidth=2.0, linestyle=lines[group.method])
        axes.set_ylabel(label)
        axes.set_xlim(left=0)
        axes.grid(color=GRID, linewidth=0.8)
    grid[-1].set_xlabel("optimiser step")
    add_legend(
        figure,
        {
            group.method: {
                "color": colours[group.method],
                "linestyle": lines[group.method],
                "linewidth": 2.0,
            }
            for group in groups
        },
    )
    return draw(figure)


@styled()
def confusion_plot(
    counts: NDArray[np.int64], names: Sequence[str], groups: Sequence[str]
) -> Drawing:
    """Heat map of a confusion matrix [C, C], each row as shares of its true class.

    Up to 25 classes every one is named, beyond that blocks of neighbours of one group. The
    colour grows with the square root, or single confusions would vanish beside the diagonal.
    """
    figure, [axes] = make_figure(4.1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(_tint(shares), interpolation="none")
    blocks = [len(list(block)) for _, block in groupby(groups)]
    if len(names) <= 25:
        places, labels = list(range(len(names))), [short(name, 12) for name in names]
    elif len(blocks) <= 25:
        edges = np.cumsum([0, *blocks]) - 0.5
        places = [(low + high) / 2 for low, high in pairwise(edges.tolist())]
        labels = [short(group, 12) for group, _ in groupby(groups)]
        for edge in edges[1:-1]:
            axes.axhline(edge, color=GRID, linewidth=0.5)
            axes.axvline(edge, color=GRID, linewidth=0.5)
    else:
        places = list(range(0, len(names), math.ceil(len(names) / 20)))
        labels = [short(names[place], 12) for place in places]
    upright = max(map(len, labels)) <= 3
    axes.set_xticks(places, labels, rotation=0 if upright else 90)
    axes.set_yticks(places, labels)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    bar = axes.inset_axes((1.04, 0, 0.05, 1))
    scale = np.linspace(0, 1, 64)[:, None] ** 2
    bar.imshow(_tint(scale), interpolation="none", aspect="auto", origin="lower")
    ticks = np.array([0, 5, 20, 50, 100])
    bar.set_yticks(63 * np.sqrt(ticks / 100), [str(tick) for tick in ticks])
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.set_ylabel("share of the true class (%)")
    bar.spines[:].set_visible(False)
    return draw(figure)


def _tint(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGBA of shares [R, S] from 0 to 1: one blue, opaque by the root, on paper of any colour."""
    from matplotlib.colors import to_rgb

    tint = np.empty((*shares.shape, 4))
    tint[..., :3] = to_rgb(_HEAT)
    tint[..., 3] = np.sqrt(shares)
    return tint


@styled()
def map_plot(
    plane: Plane, prototype_groups: Sequence[str], feature_groups: Sequence[str]
) -> Drawing:
    """Prototypes as large marks and features as small dots in the prototypes' plane.

    Args:
        plane: coordinates of J prototypes and N features.
        prototype_groups: [J] group of each prototype's class.
        feature_groups: [N] group of each feature's true class.
    """
    from matplotlib.patheffects import withStroke

    every = thinned(len(feature_groups))
    features, feature_groups = plane.features[::every], feature_groups[::every]
    order = sorted({*prototype_groups, *feature_groups})
    named = len(order) <= _NAMED
    figure, [axes] = make_figure(4.5 if named else 4.5 + legend_height(order))
    of_prototype = np.array([order.index(group) for group in prototype_groups])
    of_feature = np.array([order.index(group) for group in feature_groups])
    halo = withStroke(linewidth=2.5, foreground=PAPER)
    looks = [(COLOURS[i % 10], MARKERS[i // 10 % len(MARKERS)]) for i in range(len(order))]
    for index, (colour, _) in enumerate(looks):
        x, y = features[of_feature == index].T
        axes.scatter(x, y, s=5, color=colour, alpha=0.4, linewidth=0, zorder=2)
    for index, (colour, marker) in enumerate(looks):
        x, y = plane.prototypes[of_prototype == index].T
        axes.scatter(
            x, y, s=30, color=colour, marker=marker, edgecolor=PAPER, linewidth=0.6, zorder=3
        )
    if named:
        for index, group in enumerate(order):
            marks = plane.prototypes[of_prototype == index]
            x, y = np.median(marks if len(marks) else features[of_feature == index], axis=0)
            text = axes.text(x, y, short(group, 12).rstrip("…") or "?", zorder=4)
            text.set(ha="center", va="center", weight="bold", path_effects=[halo])
    else:
        add_legend(
            figure,
            {
                group: {"color": colour, "marker": marker, "linestyle": "none"}
                for group, (colour, marker) in zip(order, looks, strict=True)
            },
        )
    axes.set_aspect("equal", adjustable="datalim")
    first, second = plane.variance_share
    axes.set_xlabel(f"first principal component ({first:.0%} of the prototypes' variance)")
    axes.set_ylabel(f"second ({second:.0%})")
    return draw(figure)


def _curve(steps: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Value of ``key`` by step, in order; steps without it or with null are left out."""
    curve = {}
    for record in steps:
        if (value := number(record, key)) is not None:
            curve[record["step"]] = value
    return dict(sorted(curve.items()))


def _xy(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())
