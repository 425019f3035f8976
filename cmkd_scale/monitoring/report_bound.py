"""The report's section on the error bound: where each nat of a student's error comes from.

``results.json`` holds the terms under ``bound``, an entry for each memory; what they are is
written in ``cmkd_scale.diagnostics.bound``. Of a method the mean over runs and memories is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report_runs import Group, Run
from cmkd_scale.monitoring.report_style import GRID, INK, PAPER, SOFT, make_figure, short, styled
from cmkd_scale.monitoring.report_svg import Drawing, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = {
    "teacher_term": ("what the teacher gets wrong", "#94a4a2"),
    "label_gap": ("student's head against teacher's head", "#ffa90e"),
    "transfer_gap": ("lost in transfer", "#3f90da"),
}
"""Terms in words and their colours."""
_MARKS = {"U3": "o", "U2": "s", "U1": "D"}
_NULL, _FLOOR = "#e7c9c4", "#c9ced4"
_FOUND = {
    **{name: (name, "value") for name in ("risk", *_PARTS, "teacher_cross_entropy")},
    **{f"{name}_{end}": (name, end) for name in ("risk", *_PARTS) for end in ("low", "high")},
    **{f"plain_{name}": ("without_kappa", name) for name in _PARTS},
    **{name: ("bounds", name, "value") for name in _MARKS},
    **{f"null_{end}": ("null", "U3", end) for end in ("value", "low", "high")},
    "p_value": ("null", "p_value"),
    "noise_floor": ("noise_floor", "value"),
    "wrong_class_mass": ("wrong_class_mass",),
}
"""Number of a method -> where it lies in an entry."""
_CLASSES_NAMED = 3

_ADVICE = {
    "teacher_term": "the teacher itself: train a better one, or build the memory from more data",
    "label_gap": "the student's own head, which reads these features worse than the teacher's: "
    "hold it nearer to the teacher's (head_pull), or train it longer",
    "transfer_gap": "lost in transfer: the student's features do not lie where the teacher's head "
    "expects their class, so align them more strongly (transport_cost, teacher_head), train "
    "longer, or collect more samples of the classes that lose most",
}


@dataclass(frozen=True)
class Bound:
    """Terms of a method in nats: means over its runs and their memories."""

    method: str
    entries: int
    """How many means are over."""
    numbers: Mapping[str, float]
    """Those of ``_FOUND``; the noise floor may be missing."""
    worst: tuple[str, ...]
    """Classes that lose most in transfer."""


def read_bounds(groups: Sequence[Group]) -> list[Bound]:
    """The bounds of the methods that have one, in their order.

    Raises:
        IntegrityError: an entry of a run's results is not what ``cmkd evaluate`` writes.
    """
    found = []
    for group in groups:
        entries = [entry for run in group.runs for entry in _entries(run)]
        if entries:
            found.append(_mean(group.method, entries))
    return found


def _entries(run: Run) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Numbers of each entry of a run that has samples, and what its classes add to U3."""
    found = []
    for entry in run.results.get("metrics", {}).get("bound") or []:
        try:
            if entry["samples"] == 0:
                continue
            lacks = "noise_floor" if entry["noise_floor"] is None else ""
            places = {name: place for name, place in _FOUND.items() if name != lacks}
            numbers = {name: _number(entry, place) for name, place in places.items()}
            rows = entry["per_class"].items()
            lost = {name: _number(row, ["share"]) * _number(row, ["U3"]) for name, row in rows}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{run.path / 'results.json'} is malformed: the error bound lacks what it should "
                f"hold ({error!r}); run `cmkd evaluate` on this run again."
            ) from None
        found.append((numbers, lost))
    return found


def _number(entry: Mapping[str, Any], place: Sequence[str]) -> float:
    value: Any = entry
    for key in place:
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{'.'.join(place)} is no finite number")
    return float(value)


def _mean(method: str, entries: Sequence[tuple[dict[str, float], dict[str, float]]]) -> Bound:
    names = {name for numbers, _ in entries for name in numbers}
    numbers = {
        name: statistics.fmean(own[name] for own, _ in entries if name in own) for name in names
    }
    lost: dict[str, float] = {}
    for _, own in entries:
        for name, value in own.items():
            lost[name] = lost.get(name, 0.0) + value
    worst = sorted(lost, key=lambda name: (-lost[name], name))[:_CLASSES_NAMED]
    return Bound(method, len(entries), numbers, tuple(worst))


def bound_sentence(bounds: Sequence[Bound]) -> str:
    """Say what dominates the error of the best method with its own teacher, and what to do.

    It goes by the identity with kappa = 1: weighted by confidence, what the teacher's head is
    surely wrong of would count as the student's head's.
    """
    bound = next((bound for bound in bounds if "/" not in bound.method), bounds[0])
    numbers = bound.numbers
    parts = {name: numbers[f"plain_{name}"] for name in _PARTS}
    largest = max(parts, key=lambda name: parts[name])
    teacher, head, transfer = (nats(parts[name]) for name in _PARTS)
    sentence = (
        f"Of {nats(numbers['risk'])} nats of error of {bound.method}, the teacher's own errors "
        f"make {teacher}, the student's head adds {head} and the transfer {transfer}; most is "
        f"{_ADVICE[largest]}"
    )
    if largest == "transfer_gap" and bound.worst:
        sentence += f" (here {', '.join(short(name) for name in bound.worst)})"
    if numbers["p_value"] > 0.05:
        sentence += (
            "; the student is no nearer to this teacher than to one whose classes are permuted "
            f"(p = {numbers['p_value']:.2f}), so little of it can be the teacher's knowledge"
        )
    return f"{sentence}."


def nats(value: float) -> str:
    """Write nats for people."""
    return f"{value:.2f}".replace("-", "\u2212")


@styled()
def bound_plot(bounds: Sequence[Bound]) -> Drawing:
    """Each method's error as a bar of its terms, twice, above what bounds the transfer gap."""
    figure, [axes] = make_figure(1.2 * len(bounds) + 1.75)
    limit = 1.3 * max(_reach(bound) for bound in bounds)
    lowest = min(0.0, *(_reach(bound, sign=-1) for bound in bounds))
    for place, bound in enumerate(bounds):
        top = 4.0 * place
        _bar(axes, bound, "", top, height=0.85)
        _bar(axes, bound, "plain_", top + 1.0, height=0.5)
        _track(axes, bound, top + 1.9, limit)
    axes.spines["left"].set_visible(False)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=5)
    rows = [4.0 * place for place in range(len(bounds))]
    axes.set_yticks(rows, [short(bound.method, 22) for bound in bounds])
    small = [row + step for row in rows for step in (1.0, 1.9)]
    axes.set_yticks(small, ["without weight", "bounds"] * len(bounds), minor=True)
    axes.tick_params(axis="y", which="both", length=0)
    axes.tick_params(axis="y", which="minor", labelcolor=SOFT, labelsize=8)
    axes.set_ylim(rows[-1] + 3.0, -0.8)
    axes.set_xlim(1.15 * lowest, limit)
    axes.set_xlabel("nats a test sample")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    _legend(figure)
    return draw(figure)


def _legend(figure: Figure) -> None:
    """Terms in the left column, what bounds the last of them in the right one."""
    from matplotlib.lines import Line2D

    patch: dict[str, Any] = {"marker": "s", "linestyle": "none", "markersize": 9}
    mark: dict[str, Any] = {"linestyle": "none", "color": INK, "markersize": 5}
    total = {**mark, "marker": "|", "markersize": 12, "markeredgewidth": 2}
    looks = [(words, {**patch, "color": colour}) for words, colour in _PARTS.values()]
    looks += [("student's error", total), ("noise floor of U3", {**patch, "color": _FLOOR})]
    looks += [
        (f"{name}: at most this is lost", {**mark, "marker": shape})
        for name, shape in _MARKS.items()
    ]
    looks += [("U3 of permuted teachers", {**patch, "color": _NULL})]
    figure.legend(
        handles=[Line2D([], [], label=label, **look) for label, look in looks],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        handletextpad=0.4,
        columnspacing=1.4,
    )


def _reach(bound: Bound, sign: int = 1) -> float:
    """How far the bars reach to the right, or with ``sign`` -1 to the left."""
    sums = [
        sum(max(0.0, sign * bound.numbers[kind + name]) for name in _PARTS)
        for kind in ("", "plain_")
    ]
    return sign * max(*sums, 1e-9)


def _bar(axes: Axes, bound: Bound, kind: str, y: float, height: float) -> None:
    """Terms laid one after another, those below 0 to the left; a line at their sum."""
    ends = {1: 0.0, -1: 0.0}
    for name, (_, colour) in _PARTS.items():
        value = bound.numbers[kind + name]
        side = 1 if value >= 0 else -1
        axes.barh(y, value, height, left=ends[side], color=colour, edgecolor=PAPER, zorder=3)
        ends[side] += value
    risk = bound.numbers["risk"]
    axes.plot([risk, risk], [y - 0.62 * height, y + 0.62 * height], color=INK, lw=2, zorder=4)
    if not kind:
        right = max(risk, ends[1])
        axes.annotate(f"{risk:.2f}", (right, y), (6, 0), textcoords="offset points", va="center")


def _track(axes: Axes, bound: Bound, y: float, limit: float) -> None:
    """Bounds as marks, null and floor as bands; what lies beyond the axis is written at its end."""
    numbers = bound.numbers
    axes.barh(y, numbers.get("noise_floor", 0.0), 0.5, color=_FLOOR, zorder=2)
    low, high = numbers["null_low"], min(numbers["null_high"], limit)
    beyond = []
    if low < limit:
        axes.barh(y, max(high - low, 0.004 * limit), 0.5, left=low, color=_NULL, zorder=2)
    else:
        beyond.append(f"permuted {numbers['null_value']:.1f}")
    for name, shape in _MARKS.items():
        if numbers[name] < limit:
            axes.plot(numbers[name], y, shape, color=INK, markersize=5, zorder=4)
        else:
            beyond.append(f"{name} {numbers[name]:.1f}")
    if beyond:
        axes.text(limit, y + 0.7, f"{', '.join(beyond)} →", ha="right", va="center", fontsize=8)
