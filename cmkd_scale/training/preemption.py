"""One agreed stop: a SIGTERM or SIGUSR1 on any rank ends all ranks at the same step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from cmkd_scale import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Context in which those signals are remembered instead of fatal."""

    def __init__(self) -> None:
        """Nothing received yet."""
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Preemption:
        """Install the handlers."""
        self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether any rank was signalled; a collective call with one answer for all ranks."""
        return distributed.any_rank(self.received)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
