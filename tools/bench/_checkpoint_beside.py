"""Training beside a save that is under way, for ``checkpoint.py``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from tools.bench import _checkpoint_ways as ways
from tools.bench._step_variants import Setting

QUIET_STEPS = 40
"""Timed before each save."""


class Timed(NamedTuple):
    """Of a save, or of a step; seconds, or ratios of them."""

    wall: float
    cpu: float
    complete: float = 0.0
    queued: float = 0.0
    """Share of the time that the thread was ready to run, but had no core."""


class Training:
    """Steps of a small network in this thread, as training makes them."""

    def __init__(self) -> None:
        """Make a network and a batch."""
        torch.manual_seed(0)
        setting = Setting(width=16, depth=1, batch=16)
        self._model = setting.model(setting.student_shape)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        batch = setting.paired_batch()
        self._inputs, self._labels = batch.student_inputs, batch.labels

    def step(self) -> None:
        """One step."""
        loss = functional.cross_entropy(self._model(self._inputs).logits, self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def until(self, over: Callable[[int], bool]) -> Timed:
        """Mean of the steps up to the first one after which ``over(steps made)`` holds."""
        begun, cpu, queued = time.perf_counter(), time.thread_time(), seconds_queued()
        for count in itertools.count(1):
            self.step()
            if over(count):
                break
        wall, cpu = time.perf_counter() - begun, time.thread_time() - cpu
        return Timed(wall / count, cpu / count, queued=(seconds_queued() - queued) / wall)


def seconds_queued() -> float:
    """That this thread was ready to run, but had no core; 0 where the system doesn't tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def slowed(training: Training, way: ways.Way) -> Timed:
    """Steps while a save is under way, over steps right before it."""
    before = training.until(lambda count: count >= QUIET_STEPS)
    way.start()
    with ThreadPoolExecutor(1) as waiting:  # so that a look after each step costs nothing
        finished = waiting.submit(way.finish)
        during = training.until(lambda _: finished.done())
        finished.result()
    way.clear()
    return Timed(during.wall / before.wall, during.cpu / before.cpu, queued=during.queued)


def unslowed(training: Training) -> Timed:
    """The same with nothing under way: A against A."""
    before = training.until(lambda count: count >= QUIET_STEPS)
    after = training.until(lambda count: count >= QUIET_STEPS)
    return Timed(after.wall / before.wall, after.cpu / before.cpu, queued=after.queued)
