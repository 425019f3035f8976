"""The report's section on the guard: how far each teacher was trusted, and why.

``results.json`` holds a verdict for each memory under ``guard``; how it is come by is written in
``cmkd_scale.diagnostics.guard``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report_runs import Group, Run


@dataclass(frozen=True)
class Guarded:
    """Verdicts of a method: means over its runs and their memories."""

    method: str
    runs: int
    trust: float
    """0 to 1."""
    correlation: float | None
    """Of class structures; None where there were too few classes to tell."""
    z: float | None
    """The same in standard deviations above chance."""


def read_guards(groups: Sequence[Group]) -> list[Guarded]:
    """The verdicts of each method that was guarded.

    Raises:
        IntegrityError: a run's verdicts are malformed.
    """
    found = []
    for group in groups:
        rows = [(run, row) for run in group.runs for row in _rows(run)]
        if not rows:
            continue
        verdicts = [_verdict(run, row) for run, row in rows]
        told = [verdict for verdict in verdicts if verdict[1] is not None]
        found.append(
            Guarded(
                method=group.method,
                runs=len({run.path for run, _ in rows}),
                trust=statistics.fmean(verdict[0] for verdict in verdicts),
                correlation=statistics.fmean(v[1] for v in told if v[1] is not None)
                if told
                else None,
                z=statistics.fmean(v[2] for v in told if v[2] is not None) if told else None,
            )
        )
    return found


def run_trust(run: Run) -> float | None:
    """How far one run trusted its teachers, mean over its memories; None without a guard.

    Raises:
        IntegrityError: its verdicts are malformed.
    """
    trusts = [_verdict(run, row)[0] for row in _rows(run)]
    return statistics.fmean(trusts) if trusts else None


def _rows(run: Run) -> list[Any]:
    rows = run.results.get("guard", [])
    if not isinstance(rows, list):
        raise IntegrityError(f"{run.path}: 'guard' in results.json is no list of verdicts.")
    return rows


def _verdict(run: Run, row: Any) -> tuple[float, float | None, float | None]:
    """Trust, correlation and z of one memory."""
    try:
        agreement = row["agreement"]
        if agreement is None:
            return float(row["trust"]), None, None
        return float(row["trust"]), float(agreement["correlation"]), float(agreement["z"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{run.path}: a verdict of the guard in results.json is malformed ({error})."
        ) from None
