"""One agreed stop: a SIGTERM or SIGUSR1 on any rank ends all ranks at the same step.

A signal is meant for the program, not for the stage that it finds: one that comes while a stage
writes its results stops the next one. After a stop further signals change nothing, since launchers
send several, also to a program that is about to tell by its exit code what it has saved.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, ClassVar

from cmkd_scale import distributed
from cmkd_scale.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Context in which those signals are remembered instead of fatal; may be nested."""

    _depth: ClassVar[int] = 0
    _before: ClassVar[dict[int, Any]] = {}
    """The handlers that ours stand in for; empty where they don't."""
    _received: ClassVar[bool] = False

    @property
    def received(self) -> bool:
        """Whether this process was signalled and has not stopped for it yet."""
        return Preemption._received

    def __enter__(self) -> Preemption:
        """Install the handlers."""
        Preemption._depth += 1
        if not Preemption._before:
            Preemption._before = {number: signal.signal(number, _remember) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the earlier handlers back, unless the program ends or should."""
        Preemption._depth -= 1
        if Preemption._depth:
            return
        if kind is not None and issubclass(kind, PreemptedError):
            Preemption._received = False
        elif not Preemption._received:
            for number, handler in Preemption._before.items():
                signal.signal(number, handler)
            Preemption._before = {}

    def agreed(self) -> bool:
        """Whether any rank was signalled; a collective call with one answer for all ranks."""
        return distributed.any_rank(self.received)


def _remember(number: int, frame: FrameType | None) -> None:
    Preemption._received = True
