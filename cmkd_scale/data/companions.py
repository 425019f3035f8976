"""What a step reads beside its labelled samples: samples of the teacher, and unlabelled ones."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.decoding import Decoder, Request
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.modalities import Modality
from cmkd_scale.data.order import Ints, rank_positions
from cmkd_scale.data.partners import Mode, Partners
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.teacher_outputs import TeacherOutputs
from cmkd_scale.errors import CmkdError, IntegrityError
from cmkd_scale.records import Batch

TEACHER_INPUTS = "teacher_inputs"
TEACHER_LABELS = "teacher_labels"
TEACHER_FEATURES = "teacher_features"
TEACHER_LOGITS = "teacher_logits"
UNLABELLED = "unlabelled_inputs"
UNLABELLED_WEAK = "unlabelled_weak_inputs"


class TeacherSamples(Partners):
    """The teacher's samples themselves."""

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
        """Read a split of the teacher's.

        Args:
            reader: of the split.
            modality: decodes and augments.
            labels: see ``Partners``.
            mode: see ``partners``.
            seed: of draws and augmentation.
            augment: whether to augment.
            cache_bytes: decoded samples kept in memory.
        """
        super().__init__(labels, mode=mode, seed=seed, keys=map(reader.key, range(len(reader))))
        self._decoder = Decoder(
            reader, modality, seed=seed, augment=augment, cache_bytes=cache_bytes
        )

    def _read(self, places: Ints, epoch: Ints, position: Ints) -> dict[str, Tensor]:
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


class CachedSamples(Partners):
    """What the teacher has said of its samples, without augmentation, in the place of them.

    Samples are in the order of their split, so a draw finds the one that it finds in the split.
    """

    def __init__(
        self, outputs: TeacherOutputs, labels: NDArray[np.int64], *, mode: Mode, seed: int
    ) -> None:
        """Read outputs; neither the teacher nor its shards are needed.

        Args:
            outputs: of the teacher.
            labels: [N] of its samples, by position, in the student's classes; -1: none of them.
            mode: see ``partners``.
            seed: of draws.
        """
        order = np.argsort(outputs.samples.places.numpy())
        keys = (outputs.samples.keys[position] for position in order.tolist())
        super().__init__(labels[order], mode=mode, seed=seed, keys=keys)
        self._outputs = outputs
        self._order = order

    def _read(self, places: Ints, epoch: Ints, position: Ints) -> dict[str, Tensor]:
        positions = self._order[places]
        lacking = positions[self._outputs.missing[positions]].tolist()
        if lacking:
            raise IntegrityError(
                f"{self._outputs.directory} lacks sample {self._outputs.samples.keys[lacking[0]]}, "
                "which was damaged when it was written, and no other may stand in the place of a "
                "teacher's sample: build the teacher's shards again, remove that directory, and "
                "run `cmkd memory` with this teacher.cache."
            )
        features, logits = self._outputs.read(positions)
        labels = torch.from_numpy(self.labels[places])
        return {TEACHER_FEATURES: features, TEACHER_LOGITS: logits, TEACHER_LABELS: labels}


class Accompanied:
    """A loader whose batches have company."""

    def __init__(
        self,
        main: TrainLoader,
        *,
        teacher: Partners | None = None,
        unlabelled: tuple[TrainLoader, TrainLoader] | None = None,
    ) -> None:
        """Join streams to the labelled one.

        Args:
            main: of labelled samples.
            teacher: the teacher's samples, or what it has said of them.
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
