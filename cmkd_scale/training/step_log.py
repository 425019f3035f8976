"""What is logged of steps: means over the global batch, durations, what happened in between."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.training.distillation import StepResult


class StepLog:
    """Collects between two logged steps."""

    def __init__(self, *, steps: int, global_batch_size: int) -> None:
        """Start the clock.

        Args:
            steps: of the run, for the time that is left.
            global_batch_size: samples a step.
        """
        self.steps = steps
        self.global_batch_size = global_batch_size
        self.clock = Clock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._means: set[str] = set()

    def count(self, name: str, value: float) -> None:
        """Add to what is reported with the next logged step."""
        self._counts[name] += value

    def count_mean(self, name: str, value: float) -> None:
        """The same; what is reported is the mean over steps."""
        self.count(name, value)
        self._means.add(name)

    def set(self, name: str, value: float) -> None:
        """Report ``value`` with the next logged step."""
        self._counts[name] = value

    def values(self, step: int, result: StepResult, norm: Tensor) -> dict[str, float]:
        """What there is to log after ``step`` steps; a collective call, and a new beginning."""
        names = ["loss", *(f"loss/{name}" for name in result.components)]
        losses = torch.stack([result.loss, *result.components.values()]).double()
        means = distributed.all_reduce_sum(losses) / distributed.world_size()
        values = dict(zip(names, means.tolist(), strict=True))
        values["grad_norm"] = float(norm)
        values["samples_seen"] = float(step * self.global_batch_size)
        for name in self._means:
            self._counts[name] /= max(1, self.clock.steps)
        values.update(self.clock.lap(self.global_batch_size))
        values["eta_seconds"] = values["step_seconds"] * (self.steps - step)
        values.update(self._counts)
        self._counts.clear()
        self._means.clear()
        return values


class Clock:
    """Time of the steps since the last logged one, and how much of it went into waiting."""

    def __init__(self) -> None:
        """Start."""
        self.steps = 0
        self._wait = 0.0
        self._since = self._mark = time.perf_counter()

    def waiting(self) -> None:
        """A step begins: it waits for its data."""
        self._mark = time.perf_counter()

    def computing(self) -> float:
        """The data is there; seconds waited for it."""
        waited = time.perf_counter() - self._mark
        self._wait += waited
        return waited

    def lap(self, global_batch_size: int) -> dict[str, float]:
        """Durations since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        steps = max(1, self.steps)
        values = {
            "samples_per_second": self.steps * global_batch_size / seconds,
            "step_seconds": seconds / steps,
            "data_wait_seconds": self._wait,
        }
        self.steps, self._wait, self._since = 0, 0.0, now
        return values
