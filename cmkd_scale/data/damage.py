"""Samples that cannot be read: set aside with a reason, counted, up to a budget.

A damaged sample never ends a run by itself and never disappears in silence: training reads
another one in its place, evaluation leaves it out, and both report it. More of them than
the budget allows is a damaged data set, and the run ends.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

import torch

from cmkd_scale import distributed
from cmkd_scale.errors import IntegrityError

_log = logging.getLogger(__name__)

REASONS = ("missing_shard", "wrong_shard", "wrong_index", "short_read", "checksum", "undecodable")
"""Why samples are set aside; few words, since they are the values of a metric's label."""


class DamagedError(IntegrityError):
    """A sample, or a whole shard, is not what it should be."""

    def __init__(self, reason: str, message: str) -> None:
        """Say which of ``REASONS`` it is, and what is wrong with what."""
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedError], tuple[str, str]]:
        """It may cross the border of a process."""
        return DamagedError, (self.reason, str(self))


@dataclass(frozen=True, slots=True)
class Incident:
    """One damaged sample that was met."""

    place: int
    """In the split."""
    reason: str
    shard: str
    key: str
    message: str


class Namer(Protocol):
    """Puts names to places, as a ``SampleReader`` does."""

    def incident(self, place: int, error: DamagedError) -> Incident:
        """Shard and key of a damaged sample."""


def allowance(max_bad_fraction: float, samples: int) -> int:
    """How many of ``samples`` may be damaged, rounded down."""
    # As it is written: in binary, 0.29 of 100 samples would be 28.
    return int(Decimal(str(max_bad_fraction)) * samples)


class Quarantine:
    """The distinct damaged samples that a pass over a split, or a training, has met."""

    def __init__(
        self,
        samples: int,
        *,
        max_bad_fraction: float,
        record: Callable[[Incident], None] = lambda incident: None,
        known: Iterable[int] = (),
    ) -> None:
        """Allow ``max_bad_fraction`` of ``samples``, rounded down.

        Args:
            samples: that are read in an epoch.
            max_bad_fraction: 0 allows none.
            record: called with every sample that is met for the first time.
            known: places that an earlier part of the run has recorded.
        """
        self.allowed = allowance(max_bad_fraction, samples)
        self._samples = samples
        self._fraction = max_bad_fraction
        self._record = record
        self._places = set(known)
        self._last: Incident | None = None
        self._unshared: list[Incident] = []
        self._met: Counter[str] = Counter()

    def __len__(self) -> int:
        """Distinct damaged samples so far."""
        return len(self._places)

    @property
    def ratio(self) -> float:
        """The share of the samples that they are."""
        return len(self._places) / max(1, self._samples)

    @property
    def met(self) -> Mapping[str, int]:
        """How often this process left out a sample, by reason, repetitions included."""
        return dict(self._met)

    def add(self, incident: Incident) -> None:
        """Count a damaged sample that was left out."""
        self._met[incident.reason] += 1
        if incident.place not in self._places:
            _log.warning("left out: %s", incident.message)
            self._unshared.append(incident)
            self._take(incident)

    def share(self, namer: Namer) -> None:
        """Tell all ranks what each has met since the last time; a collective call.

        Raises:
            IntegrityError: on all ranks alike: they have met more than allowed.
        """
        if distributed.any_rank(bool(self._unshared)):
            rows = [(incident.place, REASONS.index(incident.reason)) for incident in self._unshared]
            self._unshared.clear()
            mine = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
            for place, reason in distributed.gather_rows(mine).tolist():
                if place in self._places:
                    continue
                if distributed.is_main():  # which records it
                    error = DamagedError(REASONS[reason], "another process has met it.")
                    self._take(namer.incident(place, error))
                else:
                    self._take(Incident(place, REASONS[reason], "", "", f"Sample number {place}."))
        self.check()

    def check(self) -> None:
        """Refuse to go on with more damaged samples than allowed.

        Raises:
            IntegrityError: names shard and key of the last one.
        """
        if len(self._places) > self.allowed:
            last = f"{self._last.message} " if self._last else ""
            raise IntegrityError(
                f"{last}In all, {len(self._places)} of {self._samples} samples are damaged, and "
                f"data.max_bad_fraction={self._fraction:g} allows {self.allowed}. Check the shards "
                "where they lie (`cmkd shards verify`), and build or copy them again; or raise "
                "data.max_bad_fraction to go on without the damaged samples."
            )

    def _take(self, incident: Incident) -> None:
        self._places.add(incident.place)
        self._last = incident
        self._record(incident)
