"""Ends a run in which a rank hangs, and says which one, where, and where the others wait.

A collective call that never ends cannot be interrupted from within, so the process ends; the
launcher ends the others, and the run goes on from its newest checkpoint. Each rank's watchdog
tells the others where it stands through a store of its own, not through the calls that hang; a
thread of its own does that, too, since a store whose machine has stopped never answers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cmkd_scale import distributed
from cmkd_scale.errors import EXIT_FAULT

PHASES = ("data", "forward", "backward", "exchange", "checkpoint", "evaluation")
"""In the order of a step."""

_LONGEST_LOOK = 5.0  # seconds between two looks at the beat


class Beat(NamedTuple):
    """Where a rank stands."""

    step: int
    phase: str
    seconds: float
    """Since it came there."""

    def place(self) -> tuple[int, int]:
        """How far it is."""
        known = PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)
        return self.step, known


class Watchdog:
    """A thread that looks whether its rank still moves."""

    def __init__(self, timeout_seconds: float, *, directory: Path) -> None:
        """Watch from ``with`` on.

        Args:
            timeout_seconds: without a call of ``at`` that end the process; 0: watch nothing.
            directory: of the run; stacks are written there.
        """
        self.timeout_seconds = timeout_seconds
        self.directory = directory
        self.before_end: Callable[[], None] = lambda: None
        """Called before the process is ended, which no exit handler hears of."""
        self._step, self._phase, self._since = 0, "start", time.monotonic()
        self._spent = dict.fromkeys(("start", *PHASES), 0.0)
        self._ended = threading.Event()
        self._look = min(_LONGEST_LOOK, timeout_seconds / 4)
        self._told: dict[int, Beat] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        """Begin to watch; a collective call."""
        if self.timeout_seconds > 0:
            self._start("watchdog", self._watch)
            store = distributed.open_store()
            if store is not None:
                self._tell(store)  # so that something is known of each
                self._start("watchdog's mail", self._correspond, store)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Watch no longer."""
        self._ended.set()
        for thread in self._threads:
            thread.join(_LONGEST_LOOK)  # the one with the store may wait for ever

    def _start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def at(self, phase: str, step: int) -> None:
        """This rank has come to a phase of a step."""
        now = time.monotonic()
        self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._step, self._phase, self._since = step, phase, now

    def phase_seconds(self) -> dict[str, float]:
        """Seconds that this rank has spent in each phase until now; from any thread."""
        spent, now = dict(self._spent), self.beat()
        spent[now.phase] = spent.get(now.phase, 0.0) + now.seconds
        return spent

    def health(self) -> tuple[bool, str]:
        """Whether this rank moves, and where it stands in words; from any thread."""
        now = self.beat()
        moves = not 0 < self.timeout_seconds < now.seconds
        word = "ok" if moves else "hangs"
        return moves, f"{word}: step {now.step}, in phase {now.phase} for {now.seconds:.1f} s"

    def beat(self) -> Beat:
        """Where this rank stands; from any thread."""
        return Beat(self._step, self._phase, time.monotonic() - self._since)

    def _watch(self) -> None:
        while not self._ended.wait(self._look):
            if self.beat().seconds > self.timeout_seconds:
                # All ranks notice within a look of each other; each must have told first.
                self._ended.wait(2 * self._look)
                if not self._ended.is_set() and self.beat().seconds > self.timeout_seconds:
                    self._end(self.beat())

    def _tell(self, store: distributed.Store) -> Beat:
        beat = self.beat()
        store.put(str(distributed.rank()), json.dumps(beat))
        return beat

    def _correspond(self, store: distributed.Store) -> None:
        """Tell where this rank stands and, when that looks bad, ask for the others."""
        with suppress(RuntimeError):  # the store's host is gone: there is nobody to tell
            while not self._ended.wait(self._look):
                if self._tell(store).seconds > self.timeout_seconds / 2:
                    texts = {rank: store.get(str(rank)) for rank in range(distributed.world_size())}
                    self._told = {r: Beat(*json.loads(t)) for r, t in texts.items() if t}

    def _end(self, mine: Beat) -> None:
        self.before_end()
        rank, ranks = distributed.rank(), distributed.world_size()
        path = self.directory / f"hang_rank_{rank}.txt"
        message = report(rank, mine, self._told, self.timeout_seconds, ranks)
        print(f"cmkd: {message} Stacks of its threads are in {path}.", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with suppress(OSError), path.open("w") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        if distributed.is_main():  # which others read the store of
            time.sleep(min(2.0, self.timeout_seconds))
        os._exit(EXIT_FAULT)


def report(
    rank: int, mine: Beat, told: dict[int, Beat], timeout_seconds: float, world_size: int = 1
) -> str:
    """A paragraph on who hangs.

    Args:
        rank: that reports.
        mine: where it stands.
        told: where each rank said it was, as far as is known.
        timeout_seconds: of the watchdog.
        world_size: number of ranks.
    """
    beats = {**told, rank: mine}
    last = min(beat.place() for beat in beats.values())
    behind = sorted(r for r, beat in beats.items() if beat.place() == last)
    waiting = sorted(set(beats) - set(behind))
    where = beats[behind[0]]
    # One whose machine has stopped has told nothing since: this rank waits for it all the longer.
    seconds = max(where.seconds, mine.seconds)
    text = (
        f"Rank {', '.join(map(str, behind))} has not moved for {seconds:.0f} s: it is at step "
        f"{where.step}, in phase '{where.phase}'"
    )
    if waiting:
        other = beats[waiting[0]]
        text += (
            f", and rank {', '.join(map(str, waiting))} waits for it (at step {other.step}, "
            f"'{other.phase}')"
        )
    elif len(beats) > 1:
        text += "; all stand there: one of them, which its stacks show, is in no collective call"
    if world_size > 1 and not told:
        text += (
            "; where the others are is not known, since rank 0, which keeps what they tell, does "
            "not answer: that may be the one that hangs"
        )
    return (
        f"{text}. After run.watchdog_seconds={timeout_seconds:g} the run ends [rank {rank}]; look "
        "at that machine, or give more time if a step may take so long. The same command "
        "continues from the newest checkpoint."
    )
