"""The report's sections on how far runs have come and how fast they go."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cmkd_scale.monitoring.report_runs import Run, number


@dataclass(frozen=True)
class Progress:
    """How far a run had come when it last logged a step."""

    run: Run
    step: int
    planned: int | None
    eta_seconds: float | None
    loss: float | None

    @property
    def share(self) -> float | None:
        """Of the planned steps, 0 to 1."""
        return min(1.0, self.step / self.planned) if self.planned else None


def read_progress(runs: Sequence[Run]) -> list[Progress]:
    """Of the runs that have logged a step and have no result yet."""
    return [
        Progress(
            run=run,
            step=run.steps[-1]["step"],
            planned=run.planned_steps,
            eta_seconds=number(run.steps[-1], "eta_seconds"),
            loss=number(run.steps[-1], "loss"),
        )
        for run in runs
        if run.steps and not run.results
    ]


@dataclass(frozen=True)
class Speed:
    """Speed of a run over its logged steps."""

    run: Run
    samples_per_second: float | None
    """All ranks."""
    step_seconds: float
    """Mean."""
    wait_share: float
    """Of the time, that waiting for data took."""
    stall_seconds: float
    """That training waited for checkpoints."""
    stall_share: float
    slowest_ratio: float | None
    """Median of what the slowest rank took, over the median of the others."""


def read_speeds(runs: Sequence[Run]) -> list[Speed]:
    """Of the runs that have logged how long their steps took."""
    return [speed for run in runs if (speed := _speed(run)) is not None]


def _speed(run: Run) -> Speed | None:
    """Means over all steps but the first logged ones, in which caches and compilers warm up."""
    windows = []
    for before, record in zip([{"step": 0}, *run.steps], run.steps, strict=False):
        seconds, count = number(record, "step_seconds"), record["step"] - before["step"]
        if seconds is not None and seconds > 0 and count > 0:
            windows.append((count, seconds * count, record))
    windows = windows[1:] or windows
    if not windows:
        return None
    steps = sum(count for count, _, _ in windows)
    seconds = sum(spent for _, spent, _ in windows)
    records = [record for _, _, record in windows]
    rated = [
        (rate * spent, spent)
        for _, spent, record in windows
        if (rate := number(record, "samples_per_second")) is not None
    ]
    samples, time = (sum(column) for column in zip(*rated, strict=True)) if rated else (0.0, 0.0)
    waited, stalled = (
        sum(number(record, key) or 0.0 for record in records)
        for key in ("data_wait_seconds", "checkpoint_stall_seconds")
    )
    ratios = [r for record in records if (r := number(record, "slowest_rank_ratio")) is not None]
    return Speed(
        run=run,
        samples_per_second=samples / time if rated else None,
        step_seconds=seconds / steps,
        wait_share=waited / seconds,
        stall_seconds=stalled,
        stall_share=stalled / seconds,
        slowest_ratio=statistics.median(ratios) if ratios else None,
    )
