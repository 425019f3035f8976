"""What the students of a table come to: paired differences, cost, the bound's identity.

Differences, their intervals and p-values are those of ``_ablation_statistics``: of the same test
clips, seed by seed. The p-values of a table are corrected for its number of rows.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.training.step_log import Clock
from tools.bench._ablation_statistics import Correct, compare
from tools.bench._accuracy_tasks import BASELINE, OURS, SEMI, STEP

CPU = "step_cpu_seconds"
"""In ``metrics.jsonl``: mean CPU seconds of a step since the previous logged step."""


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values corrected for their number (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1; none is smaller than one before it, or
    above 1. All that stay below alpha may be rejected with a chance of at most alpha to be wrong
    anywhere, however they depend on each other.
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        least = min(1.0, max(least, (len(p_values) - place) * p_values[name]))
        corrected[name] = least
    return {name: corrected[name] for name in p_values}


def compare_all(found: Mapping[str, Correct]) -> dict[str, dict[str, Any]]:
    """Of each row: ``to_baseline`` (it less ``ce_ls``), ``ours_over`` (``ucmkd_global`` less it)
    and ``semi_over`` (``ucmkd_semi`` less it), each as ``compare`` has it with ``p_holm``; absent
    where there is nothing to compare."""
    table: dict[str, dict[str, Any]] = {name: {} for name in found}
    for key, other in (("to_baseline", BASELINE), ("ours_over", OURS), ("semi_over", SEMI)):
        if not found.get(other):
            continue
        for name, row in found.items():
            if name != other and set(row) & set(found[other]):
                pair = (row, found[other]) if key == "to_baseline" else (found[other], row)
                table[name][key] = compare(*pair)
        p_values = {name: row[key]["p"] for name, row in table.items() if key in row}
        for name, p in holm(p_values).items():
            table[name][key]["p_holm"] = p
    return table


# -------------------------------------------------------------------------------- cost


@contextmanager
def counting_cpu() -> Iterator[None]:
    """Runs that train inside log the CPU seconds of their steps, which they have no name for.

    Of all threads of the process: reading and decoding, forward passes (a live teacher's, too),
    backward, optimiser, alignment and, where they fall between two logged steps, checkpoints.
    """
    lap, mark = Clock.lap, time.process_time()

    def counted(clock: Clock, global_batch_size: int) -> dict[str, float]:
        nonlocal mark
        now, steps = time.process_time(), max(1, clock.steps)
        values = lap(clock, global_batch_size)
        values[CPU] = (now - mark) / steps
        mark = now
        return values

    with patch.object(Clock, "lap", counted):
        yield


def step_cpu(directory: Path) -> float | None:
    """Usual CPU seconds of a step of a run, the median over its logged steps; None if it was
    not counted. The first has the start of the program in it and is left out."""
    logged = [line[CPU] for line in read_jsonl(directory / "metrics.jsonl")[1:] if CPU in line]
    return statistics.median(logged) if logged else None


def costs(seconds: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Cost of each row's step in steps of ``ce`` with the same seed (of ``ce_ls`` where a table
    has no ``ce``), the median over seeds; rows that cannot be compared are left out."""
    unit = seconds.get(STEP) or seconds.get(BASELINE) or {}
    found = {}
    for name, row in seconds.items():
        ratios = [row[seed] / unit[seed] for seed in row if unit.get(seed)]
        if ratios:
            found[name] = statistics.median(ratios)
    return found


# ------------------------------------------------------------------------------- bound


def check_bound(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far the worst of a run's bound reports is from what must hold.

    Args:
        reports: one for each memory: ``risk`` R, ``teacher_term`` A, ``label_gap`` B,
            ``transfer_gap`` D, each a number or a mapping that has it as ``value``, and
            ``bounds``, the upper bounds on |D| by name.

    Returns:
        ``identity``: the largest |A + B + D - R|; ``excess``: the largest |D| - U, which should
        not be above 0. Empty without reports.
    """
    identity, excess = [], []
    for report in reports:
        names = ("risk", "teacher_term", "label_gap", "transfer_gap")
        risk, teacher, label, transfer = (_number(report[name]) for name in names)
        identity.append(abs(teacher + label + transfer - risk))
        excess += [
            abs(transfer) - _number(bound)
            for bound in report["bounds"].values()
            if bound is not None
        ]
    found = {"identity": max(identity)} if identity else {}
    return found | ({"excess": max(excess)} if excess else {})


def _number(value: Any) -> float:
    return float(value["value"] if isinstance(value, Mapping) else value)


# ------------------------------------------------------------------- label efficiency


def labels_needed(curve: Mapping[int, float], wanted: float) -> float | None:
    """Labels a class at which a curve first reaches an accuracy, between points by a straight
    line over the logarithm of the labels; None if it does not get there.

    Args:
        curve: labels a class -> accuracy.
        wanted: accuracy to reach. Where the first point is above it, that point is the answer.
    """
    points = sorted(curve.items())
    if points and points[0][1] >= wanted:
        return float(points[0][0])
    for (few, low), (many, high) in itertools.pairwise(points):
        if low < wanted <= high:
            share = (wanted - low) / (high - low)
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return None
