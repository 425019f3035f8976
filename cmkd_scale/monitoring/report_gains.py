"""The report's section on classes: which of them the teacher helps, and which it hurts.

The best method with its own teacher is held against the control without one, class by class,
over the seeds that both were run with: the same clips, the same initial weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmkd_scale.monitoring.report_runs import CONTROLS, Group
from cmkd_scale.monitoring.report_style import GAIN, GRID, INK, LOSS, make_figure, short, styled
from cmkd_scale.monitoring.report_svg import Drawing, draw

DRAWN = 30
"""Up to so many classes each one has its bar."""
_LISTED = 8
"""Of more classes, so many are listed at each end."""


@dataclass(frozen=True)
class ClassGain:
    """What a teacher gives one class, in shares of its test samples; means over seeds."""

    name: str
    with_teacher: float
    without: float
    by_seed: tuple[float, ...]
    """Differences, one for each seed."""

    @property
    def gain(self) -> float:
        """Mean difference; above 0 the teacher helps."""
        return statistics.fmean(self.by_seed)


@dataclass(frozen=True)
class Gains:
    """Gains of a method over a control, the largest first."""

    method: str
    control: str
    seeds: tuple[int, ...]
    classes: tuple[ClassGain, ...]

    @property
    def sentence(self) -> str:
        """How many classes gain and lose."""
        helped = sum(row.gain > 0 for row in self.classes)
        hurt = sum(row.gain < 0 for row in self.classes)
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else f"seed {self.seeds[0]}"
        return (
            f"{self.method} against {self.control}, over {seeds}: of {len(self.classes)} classes "
            f"{helped} gain, {hurt} lose and {len(self.classes) - helped - hurt} stay as they were."
        )

    @property
    def drawn(self) -> bool:
        """Whether there are few enough classes for a bar each."""
        return len(self.classes) <= DRAWN

    @property
    def ends(self) -> tuple[list[ClassGain], list[ClassGain]]:
        """The classes that gain most, and those that lose most, most first."""
        gained = [row for row in self.classes if row.gain > 0]
        lost = [row for row in reversed(self.classes) if row.gain < 0]
        return gained[:_LISTED], lost[:_LISTED]


def read_gains(groups: Sequence[Group], control: Group | None) -> Gains | None:
    """The gains of the best method that shares a seed and a class with the control.

    Args:
        groups: by method, the most accurate first.
        control: that without a teacher; None if there is none.
    """
    if control is None:
        return None
    without = _by_seed(control)
    for group in groups:
        if group.method in CONTROLS or "/" in group.method:
            continue
        taught = _by_seed(group)
        seeds = tuple(sorted(taught.keys() & without.keys()))
        if not seeds:
            continue
        names = set.intersection(*(set(of[seed]) for of in (taught, without) for seed in seeds))
        rows = [
            ClassGain(
                name,
                statistics.fmean(taught[seed][name] for seed in seeds),
                statistics.fmean(without[seed][name] for seed in seeds),
                tuple(taught[seed][name] - without[seed][name] for seed in seeds),
            )
            for name in names
        ]
        if rows:
            rows.sort(key=lambda row: (-row.gain, row.name))
            return Gains(group.method, control.method, seeds, tuple(rows))
    return None


def _by_seed(group: Group) -> dict[int, Mapping[str, float]]:
    """Accuracies by class of each seed; of runs that share a seed the last one."""
    return {
        run.seed: run.class_accuracies
        for run in group.runs
        if run.seed is not None and run.class_accuracies
    }


@styled()
def gains_plot(gains: Gains) -> Drawing:
    """A bar for each class, to the right where it gains; a dot for each seed."""
    figure, [axes] = make_figure(0.2 * len(gains.classes) + 0.9)
    for place, row in enumerate(gains.classes):
        points = [100 * value for value in row.by_seed]
        axes.barh(place, 100 * row.gain, 0.7, color=GAIN if row.gain > 0 else LOSS, zorder=2)
        if len(points) > 1:
            axes.plot(points, [place] * len(points), "o", color=INK, markersize=2.5, zorder=3)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=4)
    axes.set_yticks(range(len(gains.classes)), [short(row.name) for row in gains.classes])
    axes.set_ylim(len(gains.classes) - 0.4, -0.6)
    reach = max(1.0, *(abs(100 * v) for row in gains.classes for v in (*row.by_seed, row.gain)))
    axes.set_xlim(-1.05 * reach, 1.05 * reach)
    axes.set_xlabel("gain in test accuracy (points)")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return draw(figure)
