"""Which teacher's sample stands beside which of the student's.

It is decided by the place in the order alone, as everything about the order is: not by rank,
worker or batch size. ``data.mode`` says how:

- ``paired``: the sample with the same key, both views of one event;
- ``class_matched``: a random one of the same class, as the reference implementation draws them;
- ``unpaired``: any, drawn without a look at the student's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.order import Ints, mix64, stable_hash
from cmkd_scale.errors import UsageError
from cmkd_scale.records import Batch

Mode = Literal["unpaired", "class_matched", "paired"]

_TEACHER = 0x74656163686572  # sets these draws apart from those of epochs


class Partners(ABC):
    """Of a teacher, one sample for each student sample of a batch."""

    def __init__(
        self, labels: NDArray[np.int64], *, mode: Mode, seed: int, keys: Iterable[str]
    ) -> None:
        """Group the teacher's samples by class, or by key.

        Args:
            labels: [N] of the teacher's samples in the student's classes; -1: none of them.
            mode: see the module.
            seed: of the draws.
            keys: [N] of the teacher's samples, in order; read for ``paired`` alone.
        """
        self.labels = labels
        self.mode = mode
        self.seed = seed
        known = np.flatnonzero(labels >= 0)
        order = known[np.argsort(labels[known], kind="stable")]
        self._by_class = order
        size = int(labels.max(initial=-1)) + 1
        self._count = np.bincount(labels[known], minlength=size)
        self._start = np.cumsum(self._count) - self._count
        self._place: dict[str, int] = {}
        if mode == "paired":
            self._place = {key: place for place, key in enumerate(keys)}

    def require_keys(self, keys: Sequence[str]) -> None:
        """Refuse student samples that have no partner.

        Raises:
            UsageError: naming some.
        """
        _refuse_missing(
            [key for key in keys if key not in self._place],
            len(keys),
            "samples of the student have no partner of the same key among the teacher's",
            "data.mode=class_matched",
        )

    def require_classes(self, classes: Mapping[int, str]) -> None:
        """Refuse a student with classes (index -> name) that the teacher's data lacks.

        Raises:
            UsageError: naming them.
        """
        lacking = [
            name
            for label, name in classes.items()
            if label >= len(self._count) or self._count[label] == 0
        ]
        _refuse_missing(
            lacking,
            len(classes),
            "classes have no sample of the teacher's to stand beside the student's",
            "data.mode=unpaired, or leave those classes out",
        )

    def beside(self, batch: Batch, counts: Ints, epoch_size: int) -> dict[str, Tensor]:
        """What a step reads of the teacher's beside a batch, by name, each [B, ...].

        Args:
            batch: of the student.
            counts: [B] place of each of its samples in the endless order.
            epoch_size: samples in an epoch.

        Raises:
            IntegrityError: a sample cannot be read: no other may stand in its place.
        """
        return self._read(self._choose(batch, counts), *np.divmod(counts, epoch_size))

    @abstractmethod
    def _read(self, places: Ints, epoch: Ints, position: Ints) -> dict[str, Tensor]:
        """What a step reads of the samples at ``places`` [B]."""

    def _choose(self, batch: Batch, counts: Ints) -> Ints:
        if self.mode == "paired":
            return np.array([self._place[key] for key in batch.keys], dtype=np.int64)
        drawn = mix64(counts.astype(np.uint64) ^ np.uint64(stable_hash(self.seed, _TEACHER)))
        if self.mode == "unpaired":
            anywhere = (drawn % np.uint64(len(self._by_class))).astype(np.int64)
            return np.asarray(self._by_class[anywhere])
        labels = batch.labels.numpy()
        within = (drawn % self._count[labels].astype(np.uint64)).astype(np.int64)
        return np.asarray(self._by_class[self._start[labels] + within])


def _refuse_missing(missing: Sequence[str], of: int, what: str, remedy: str) -> None:
    if missing:
        raise UsageError(
            f"{len(missing)} of {of} {what} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): set {remedy}."
        )
