"""What a frozen teacher says of the samples of a split: they pass it, or its outputs are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.damage import Quarantine, allowance
from cmkd_scale.data.loader import explicit_batches
from cmkd_scale.data.teacher_outputs import TeacherOutputs
from cmkd_scale.errors import IntegrityError, PreemptedError
from cmkd_scale.models.model import Model
from cmkd_scale.monitoring.console import counting
from cmkd_scale.records import ModelOutput
from cmkd_scale.stages.common import Trained
from cmkd_scale.stages.meetings import in_meetings
from cmkd_scale.stages.pass_identity import machine_kinds
from cmkd_scale.stages.pass_plan import Plan
from cmkd_scale.stages.streams import SplitData, open_quarantine
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""
Said = tuple[NDArray[np.int64], Tensor, ModelOutput]
"""Places of a batch that could be read, their labels, and what the model says of them."""


@dataclass(frozen=True, slots=True)
class Start:
    """What passes where."""

    trained: Trained
    data: SplitData
    """What the teacher was trained on."""
    held_out: SplitData
    """What it was not."""
    config: Config
    directory: Path
    """Of the run."""
    device: torch.device
    preemption: Preemption
    """Watched between batches."""
    watchdog: Watchdog
    """Told of each batch."""


class Reading(ABC):
    """A teacher's outputs for a split, and what may end the reading of them."""

    def __init__(self, start: Start, data: SplitData) -> None:
        """Of one split."""
        self.data = data
        self._preemption = start.preemption
        self._watchdog = start.watchdog

    @property
    @abstractmethod
    def machines(self) -> list[int]:
        """Kinds of machines that the outputs are computed on; a collective call."""

    @abstractmethod
    def forward(self, parts: list[NDArray[np.int64]]) -> Iterator[Said]:
        """What the teacher says of each part."""

    @abstractmethod
    def still_missing(self, places: NDArray[np.int64]) -> bool:
        """Whether none of the samples at ``places`` can be read."""

    @abstractmethod
    def share(self) -> None:
        """Tell all ranks what each has met; a collective call.

        Raises:
            IntegrityError: on all ranks: too many samples are damaged.
        """

    def take_together(
        self, parts: list[NDArray[np.int64]], most: int, take: Callable[[int, Said], None]
    ) -> None:
        """``take`` what the teacher says of this rank's parts, by number; a collective call.

        Ranks meet after every ``MEETING_BATCHES`` parts. One that fails or is signalled stops at
        once and waits for the others there; then all stop.

        Args:
            parts: of this rank.
            most: the number of parts of the rank that has most.
            take: called for each part in turn.

        Raises:
            PreemptedError: on all ranks: one was signalled.
            CmkdError: on all ranks: one has failed, or too many samples are damaged.
        """
        for _ in in_meetings(
            enumerate(self.forward(parts)),
            most,
            lambda said: take(*said),
            preemption=self._preemption,
            watchdog=self._watchdog,
            phase="data",
        ):
            distributed.run_together(self.share)
            stop_if_signalled(self._preemption)


class LiveReading(Reading):
    """The samples of a split pass the model."""

    def __init__(self, start: Start, data: SplitData) -> None:
        """Begin; a collective call."""
        super().__init__(start, data)
        self._device = start.device
        self._model: Model = start.trained.model.to(start.device).eval()
        self._bf16 = start.config.memory.mixed_precision == "bf16"
        fraction, samples = start.config.data.max_bad_fraction, len(data.labelled())
        self._quarantine: Quarantine = open_quarantine(start.directory, data, fraction, samples)

    @property
    def machines(self) -> list[int]:
        """Of all ranks."""
        return machine_kinds(self._device)

    def forward(self, parts: list[NDArray[np.int64]]) -> Iterator[Said]:
        """See ``Reading``."""
        head, data = self._model.head, self.data
        nothing = ModelOutput(
            torch.zeros(0, head.in_features), torch.zeros(0, head.out_features), ()
        )
        for left, batch in explicit_batches(
            data.reader, data.modality, parts, quarantine=self._quarantine, workers=data.workers
        ):
            if batch is None:
                yield left, torch.zeros(0, dtype=torch.int64), nothing
                continue
            with torch.no_grad(), self._autocast():
                output = self._model(batch.inputs.to(self._device))
            yield left, batch.labels, output

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)

    def still_missing(self, places: NDArray[np.int64]) -> bool:
        """See ``Reading``; they are read."""
        again = explicit_batches(
            self.data.reader, self.data.modality, [places], quarantine=self._quarantine
        )
        return not len(places) or all(batch is None for _, batch in again)

    def share(self) -> None:
        """See ``Reading``."""
        self._quarantine.share(self.data.reader)


class CachedReading(Reading):
    """The outputs of a split are read; neither model nor samples are."""

    def __init__(self, start: Start, data: SplitData, outputs: TeacherOutputs) -> None:
        """Begin.

        Args:
            start: what would pass where.
            data: the split.
            outputs: of the teacher for it, with positions in the order of its pass.

        Raises:
            IntegrityError: the outputs lack more samples than are allowed to be damaged.
        """
        super().__init__(start, data)
        self._outputs = outputs
        places = Plan.make(data, outputs.manifest.batch_size).places
        self._position = np.zeros(len(data.labels), dtype=np.int64)
        self._position[places] = np.arange(len(places))
        lost, fraction = int(outputs.missing.sum()), start.config.data.max_bad_fraction
        if lost > allowance(fraction, len(outputs)):
            raise IntegrityError(
                f"{outputs.directory} lacks {lost} of {len(outputs)} samples, which were damaged "
                f"when it was written, and data.max_bad_fraction={fraction:g} allows fewer: build "
                "the teacher's shards again, remove that directory, and run the same command."
            )

    @property
    def machines(self) -> list[int]:
        """Of those that wrote the outputs."""
        return self._outputs.manifest.machines

    def forward(self, parts: list[NDArray[np.int64]]) -> Iterator[Said]:
        """See ``Reading``."""
        for places in parts:
            left = places[~self._outputs.missing[self._position[places]]]
            features, logits = self._outputs.read(self._position[left])
            labels = torch.from_numpy(self.data.labels[left].astype(np.int64))
            yield left, labels, ModelOutput(features, logits, ())

    def still_missing(self, places: NDArray[np.int64]) -> bool:
        """See ``Reading``."""
        return bool(self._outputs.missing[self._position[places]].all())

    def share(self) -> None:
        """All ranks know."""


def stop_if_signalled(preemption: Preemption) -> None:
    """A place where all ranks stop if any was signalled; a collective call.

    Raises:
        PreemptedError: on all ranks.
    """
    if preemption.agreed():
        raise PreemptedError(
            "Stopped by a signal; what has passed the teacher is kept. Run the same command again "
            "to go on from there."
        )


def progress(title: str) -> AbstractContextManager[Progress]:
    """Progress on rank 0."""
    return counting(title) if distributed.is_main() else nullcontext(lambda done, total: None)
