"""Where a logged step goes: a JSON-lines file, the console, the exporter, trackers.

The loop of each rank holds one ``Sinks`` and calls ``step`` after each step and
``log(step, values)`` with the numbers of a logged one. The names in ``values`` are those of
``monitoring/metrics.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One destination of logged steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step."""

    def close(self) -> None:
        """Release what the sink holds; nothing is logged afterwards."""


@runtime_checkable
class StepSink(Protocol):
    """A sink that wants to know of every step, too."""

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Note that ``step`` has ended, how long it took, and how long it waited for data."""


class Sinks:
    """Several sinks behind one; perhaps none."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = tuple(sinks)
        self._step_sinks = tuple(sink for sink in self._sinks if isinstance(sink, StepSink))

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Tell every sink that wants to know of each step."""
        for sink in self._step_sinks:
            sink.step(step, seconds, waited_seconds)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass ``values`` of ``step`` (numbers by name, see ``metrics.py``) to every sink."""
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        """Close every sink, also those after one that fails to close."""
        for sink in self._sinks:
            try:
                sink.close()
            except Exception:
                _logger.exception("closing %s failed", type(sink).__name__)
