"""Passes over data in which ranks meet now and then, so that none waits in vain for another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

from cmkd_scale import distributed
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

MEETING_BATCHES = 64
"""After so many batches of each rank all meet: a signal, a failure or too much damage on one of
them reaches the others there, and none waits for a slower one longer than a collective may."""

_Item = TypeVar("_Item")


def in_meetings(
    items: Iterator[_Item],
    most: int,
    take: Callable[[_Item], None],
    *,
    preemption: Preemption,
    watchdog: Watchdog,
    phase: str,
    step: int = 0,
) -> Iterator[None]:
    """``take`` this rank's items; yields at each meeting of all ranks. A collective call.

    A rank that fails or is signalled stops at once and waits for the others at the meeting.

    Args:
        items: of this rank.
        most: the number of items of the rank that has most.
        take: called for each item in turn.
        preemption: watched between items; whoever calls this asks it at each meeting.
        watchdog: told of each item.
        phase: that it is told.
        step: that the items are counted on from, for the watchdog.

    Raises:
        CmkdError: on all ranks: one has failed.
    """

    def some(begin: int) -> None:
        for number, item in enumerate(itertools.islice(items, MEETING_BATCHES), start=begin):
            watchdog.at(phase, step + number)
            take(item)
            if preemption.received:
                break
        # Ahead of all who are still at it, with however few items of its own.
        watchdog.at("exchange", step + begin + MEETING_BATCHES)

    # Ranks may have other numbers of items, but they meet equally often.
    for begin in range(0, max(1, most), MEETING_BATCHES):
        distributed.run_together(functools.partial(some, begin))
        yield
