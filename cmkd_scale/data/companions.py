"""What a step reads beside its labelled samples: samples of the teacher, and unlabelled ones.

Which teacher's sample stands beside which student's is decided by the place in the order alone, as
everything about the order is: not by rank, worker or batch size. ``data.mode`` says how:

- ``paired``: the sample with the same key, both views of one event;
- ``class_matched``: a random one of the same class, as the reference implementation draws them;
- ``unpaired``: any, drawn without a look at the student's.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.decoding import Decoder, Request
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.order import Ints, mix64, rank_positions, stable_hash
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError
from cmkd_scale.records import Batch

Mode = Literal["unpaired", "class_matched", "paired"]

TEACHER_INPUTS = "teacher_inputs"
TEACHER_LABELS = "teacher_labels"
UNLABELLED = "unlabelled_inputs"
UNLABELLED_WEAK = "unlabelled_weak_inputs"

_TEACHER = 0x74656163686572  # sets these draws apart from those of epochs


class TeacherSamples:
    """The teacher's samples, one for each student sample of a batch."""

    def __init__(
        self,
        reader: SampleReader,
        modality: Modality,
        labels: NDArray[np.int64],
        *,
        mode: Mode,
        seed: int,
        augment: bool,
        cache_bytes: int = 0,
    ) -> None:
        """Group the teacher's samples by class, or by key.

        Args:
            reader: of the teacher's split.
            modality: decodes and augments.
            labels: [N] of the teacher's samples in the student's classes; -1: none of them.
            mode: see the module.
            seed: of draws and augmentation.
            augment: whether to augment.
            cache_bytes: decoded samples kept in memory.
        """
        self.labels = labels
        self.mode = mode
        self.seed = seed
        self._decoder = Decoder(
            reader, modality, seed=seed, augment=augment, cache_bytes=cache_bytes
        )
        known = np.flatnonzero(labels >= 0)
        order = known[np.argsort(labels[known], kind="stable")]
        self._by_class = order
        size = int(labels.max(initial=-1)) + 1
        self._count = np.bincount(labels[known], minlength=size)
        self._start = np.cumsum(self._count) - self._count
        self._place: dict[str, int] = {}
        if mode == "paired":
            self._place = {reader.key(place): place for place in range(len(reader))}

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
        """The teacher's inputs [B, ...] and labels [B] for a batch.

        Args:
            batch: of the student.
            counts: [B] place of each of its samples in the endless order.
            epoch_size: samples in an epoch.

        Raises:
            IntegrityError: a sample cannot be read: no other may stand in its place.
        """
        places = self._choose(batch, counts)
        epoch, position = np.divmod(counts, epoch_size)
        delivery = self._decoder[Request(places, epoch, position)]
        if isinstance(delivery, CmkdError):
            raise delivery
        if delivery.damaged:
            raise IntegrityError(
                f"{delivery.damaged[0][1].message} No other may stand in the place of a teacher's "
                "sample: run `cmkd shards verify` on its shards and build them again."
            )
        return {
            TEACHER_INPUTS: torch.as_tensor(delivery.inputs),
            TEACHER_LABELS: torch.from_numpy(self.labels[places]),
        }

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


class Accompanied:
    """A loader whose batches have company."""

    def __init__(
        self,
        main: TrainLoader,
        *,
        teacher: TeacherSamples | None = None,
        unlabelled: tuple[TrainLoader, TrainLoader] | None = None,
    ) -> None:
        """Join streams to the labelled one.

        Args:
            main: of labelled samples.
            teacher: of the teacher's samples.
            unlabelled: the same samples twice, augmented and as they are.
        """
        self.main = main
        self.teacher = teacher
        self.unlabelled = unlabelled

    def batches(self) -> Generator[Batch, None, None]:
        """See ``TrainLoader.batches``."""
        main = self.main.batches()
        others = [loader.batches() for loader in self.unlabelled or ()]
        try:
            while True:
                begin = self.main.delivered
                batch = next(main)
                beside: dict[str, Tensor] = {}
                if self.teacher is not None:
                    beside |= self.teacher.beside(batch, self._counts(begin), len(self.main.order))
                for name, other in zip((UNLABELLED, UNLABELLED_WEAK), others, strict=False):
                    beside[name] = next(other).inputs
                yield replace(batch, beside=beside)
        finally:
            for stream in (main, *others):
                stream.close()

    def state(self) -> dict[str, Any]:
        """That of the labelled stream, and where the unlabelled one stands."""
        state = self.main.state()
        if self.unlabelled is not None:
            state["unlabelled"] = self.unlabelled[0].state()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ``TrainLoader.load_state``."""
        self.main.load_state(state)
        for loader in self.unlabelled or ():
            loader.load_state(state["unlabelled"])

    def epoch_progress(self) -> float:
        """Of the labelled stream."""
        return self.main.epoch_progress()

    def bad_samples_ratio(self) -> float:
        """Of the stream with the largest."""
        return max(loader.bad_samples_ratio() for loader in self._loaders())

    def exchange(self) -> dict[str, float]:
        """Of all streams; a collective call."""
        total: dict[str, float] = {}
        for loader in self._loaders():
            for name, value in loader.exchange().items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _loaders(self) -> tuple[TrainLoader, ...]:
        return (self.main, *(self.unlabelled or ()))

    def _counts(self, begin: int) -> Ints:
        main = self.main
        stop = begin + main.global_batch_size
        return np.array(rank_positions(begin, stop, main.rank, main.world_size), dtype=np.int64)


def _refuse_missing(missing: Sequence[str], of: int, what: str, remedy: str) -> None:
    if missing:
        raise UsageError(
            f"{len(missing)} of {of} {what} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}): set {remedy}."
        )
