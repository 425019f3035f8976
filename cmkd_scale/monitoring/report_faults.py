"""The report's section on faults: what went wrong in a run and what it did about it.

Counts are of ``metrics.jsonl`` (see ``monitoring.metrics``), restarts of ``results.json`` where
the run has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cmkd_scale.monitoring.report_guard import run_trust
from cmkd_scale.monitoring.report_runs import Run, number

_SLOW = 1.5
"""Times the others' median: what a run warns of, too."""
_SKIPPED = "samples_skipped/"


@dataclass(frozen=True)
class Faults:
    """What a run survived."""

    run: Run
    told: tuple[str, ...]
    """A phrase for each kind of fault; empty where nothing went wrong."""
    trust: float | None
    """What the guard gave the teacher, 0 to 1; None without a guard."""


def read_faults(runs: Sequence[Run]) -> list[Faults]:
    """Of each run that trains: that has logged a step or counted its restarts.

    Raises:
        IntegrityError: a verdict of a guard is malformed.
    """
    trained = [run for run in runs if run.steps or "restarts" in run.results]
    return [Faults(run, tuple(_tell(run)), run_trust(run)) for run in trained]


def _tell(run: Run) -> list[str]:
    restarts = _restarts(run)
    damaged = _sums(run, _SKIPPED)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(damaged.items()))
    lost = sum(damaged.values())
    told = {
        f"continued from a checkpoint {_times(restarts['resume'])}": restarts["resume"],
        f"diverged and rolled back {_times(restarts['rollback'])}": restarts["rollback"],
        f"left out {_many(skipped := _sum(run, 'steps_skipped'), 'step')} whose gradient was not "
        "finite": skipped,
        f"{_many(failures := _sum(run, 'checkpoint_failures'), 'checkpoint')} could not be "
        "written": failures,
        f"left out {_many(lost, 'damaged training sample')} ({reasons})": lost,
        f"left out {_many(tested := run.skipped_in_test, 'damaged test sample')}": tested,
        f"tried {_many(retries := _sum(run, 'read_retries'), 'read')} again": retries,
        f"memory or potentials of {_many(other := _sum(run, 'memory_rank_mismatches'), 'rank')} "
        "differed": other,
    }
    return [phrase for phrase, count in told.items() if count] + _slow(run)


def _slow(run: Run) -> list[str]:
    """Which rank was slowest at worst, and how often any was slow."""
    found = [
        (ratio, rank)
        for record in run.steps
        if (ratio := number(record, "slowest_rank_ratio")) is not None
        and (rank := number(record, "slowest_rank")) is not None
    ]
    slow = [pair for pair in found if pair[0] > _SLOW]
    if not slow:
        return []
    ratio, rank = max(slow)
    return [
        f"waited for a slow rank in {len(slow)} of {len(found)} logged steps (at worst rank "
        f"{rank:.0f}, {ratio:.1f} times the others)"
    ]


def _restarts(run: Run) -> Mapping[str, int]:
    """Totals by reason, as the result or the newest step that has them says."""
    found = {}
    for reason in ("resume", "rollback"):
        logged = (number(record, f"restarts/{reason}") for record in reversed(run.steps))
        last = next((value for value in logged if value is not None), 0.0)
        found[reason] = int(run.results.get("restarts", {}).get(reason, last))
    return found


def _sums(run: Run, prefix: str) -> dict[str, int]:
    """Totals of increments by what follows ``prefix``; none that are 0."""
    keys = {key for record in run.steps for key in record if key.startswith(prefix)}
    sums = {key.removeprefix(prefix): _sum(run, key) for key in keys}
    return {name: count for name, count in sums.items() if count}


def _sum(run: Run, key: str) -> int:
    return round(sum(number(record, key) or 0.0 for record in run.steps))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
