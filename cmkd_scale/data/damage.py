"""Samples that cannot be read: set aside with a reason, counted, up to a budget.

A damaged sample never ends a run by itself and never disappears in silence: training reads
another one in its place, evaluation leaves it out, and both report it. More of them than
the budget allows is a damaged data set, and the run ends.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

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


@dataclass(frozen=True, slots=True)
class Incident:
    """One damaged sample that was met."""

    place: int
    """In the split."""
    reason: str
    shard: str
    key: str
    message: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(
            {
                "shard": self.shard,
                "key": self.key,
                "reason": self.reason,
                "place": self.place,
                "message": self.message,
            }
        )


class Quarantine:
    """The distinct damaged samples of a split."""

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
            max_bad_fraction: 0 ends the run at the first damaged sample.
            record: called with every sample that is met for the first time.
            known: places that an earlier part of the run has recorded.
        """
        # As it is written: in binary, 0.29 of 100 samples would be 28.
        self.allowed = int(Decimal(str(max_bad_fraction)) * samples)
        self._samples = samples
        self._fraction = max_bad_fraction
        self._record = record
        self._places = set(known)
        self._met: Counter[str] = Counter()

    def __len__(self) -> int:
        """Distinct damaged samples so far."""
        return len(self._places)

    @property
    def met(self) -> Mapping[str, int]:
        """How often a sample was left out, by reason, repetitions included."""
        return dict(self._met)

    def add(self, incident: Incident) -> None:
        """Count a damaged sample that was left out.

        Raises:
            IntegrityError: these are more than allowed; names shard and key of this one.
        """
        self._met[incident.reason] += 1
        if incident.place in self._places:
            return
        self._places.add(incident.place)
        self._record(incident)
        _log.warning("left out: %s", incident.message)
        self.check(incident)

    def merge(self, incidents: Iterable[Incident]) -> None:
        """Take in what other processes have met and reported.

        Raises:
            IntegrityError: these are more than allowed.
        """
        for incident in incidents:
            if incident.place not in self._places:
                self._places.add(incident.place)
                self._record(incident)
                self.check(incident)

    def check(self, incident: Incident) -> None:
        """Raise ``IntegrityError`` if there are more damaged samples than allowed."""
        if len(self._places) > self.allowed:
            raise IntegrityError(
                f"{incident.message} With it, {len(self._places)} of {self._samples} samples are "
                f"damaged, and data.max_bad_fraction={self._fraction:g} allows {self.allowed}. Run "
                "`cmkd shards verify` on the shards and build or copy them again, or raise "
                "data.max_bad_fraction to train without the damaged samples."
            )
