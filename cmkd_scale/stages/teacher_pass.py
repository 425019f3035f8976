"""One pass of the frozen teacher over its data, into a spool that outlives a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.data.loader import explicit_batches
from cmkd_scale.errors import CmkdError, PreemptedError
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput
from cmkd_scale.stages.common import Trained
from cmkd_scale.stages.meetings import in_meetings
from cmkd_scale.stages.pass_identity import parts_identity
from cmkd_scale.stages.pass_plan import Plan, choose_by_key
from cmkd_scale.stages.streams import SplitData, open_quarantine
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

PASS = "pass"
"""Directory of the run that holds what has passed the teacher, until there are results."""

Progress = Callable[[int, int], None]
_Said = tuple[NDArray[np.int64], Tensor, ModelOutput]
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


@dataclass(frozen=True, slots=True)
class Passed:
    """What the teacher has left."""

    spool: Spool
    """This rank's."""
    risk: Moments
    """This rank's."""
    counts: dict[str, int]
    """Of all ranks: batches, and samples that were left out because they are damaged."""
    reused: int
    """Batches that an earlier try had passed."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A model that reads a split, and what may end that."""

    model: Model
    data: SplitData
    device: torch.device
    quarantine: Quarantine
    preemption: Preemption
    watchdog: Watchdog

    @staticmethod
    def open(start: Start, model: Model, data: SplitData) -> _Reading:
        """Begin; a collective call."""
        fraction, samples = start.config.data.max_bad_fraction, len(data.labelled())
        quarantine = open_quarantine(start.directory, data, fraction, samples)
        return _Reading(model, data, start.device, quarantine, start.preemption, start.watchdog)

    def forward(self, parts: list[NDArray[np.int64]]) -> Iterator[_Said]:
        """What the model says of each part."""
        head = self.model.head
        nothing = ModelOutput(
            torch.zeros(0, head.in_features), torch.zeros(0, head.out_features), ()
        )
        data = self.data
        for left, batch in explicit_batches(
            data.reader, data.modality, parts, quarantine=self.quarantine, workers=data.workers
        ):
            if batch is None:
                yield left, torch.zeros(0, dtype=torch.int64), nothing
                continue
            with torch.no_grad():
                output = self.model(batch.inputs.to(self.device))
            yield left, batch.labels, output

    def take_together(
        self, parts: list[NDArray[np.int64]], most: int, take: Callable[[int, _Said], None]
    ) -> None:
        """``take`` what the model says of this rank's parts, by number; a collective call.

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
            preemption=self.preemption,
            watchdog=self.watchdog,
            phase="data",
        ):
            distributed.run_together(lambda: self.quarantine.share(self.data.reader))
            stop_if_signalled(self.preemption)


def run_pass(start: Start, identity: str, progress: Progress) -> Passed:
    """The teacher's pass over its data and over held-out data; a collective call.

    Whatever ends it early, the batches that have passed are in parts.

    Args:
        start: what passes where.
        identity: of the pass; parts of it that an earlier try has left are taken up.
        progress: told samples done, and how many there are.

    Raises:
        PreemptedError: a signal asked for a stop.
        IntegrityError: more samples are damaged than allowed, or the teacher has diverged.
        UsageError: the spool cannot be written.
    """
    model, settings = start.trained.model.to(start.device).eval(), start.config.memory
    reading, held_out = (
        _Reading.open(start, model, split) for split in (start.data, start.held_out)
    )
    shared = parts_identity(identity, start.device)
    spool = Spool(model.head.in_features, start.directory / PASS, shared)
    plan = Plan.make(start.data, settings.batch_size)
    reused = _pass_over(reading, plan, spool, settings.max_samples_per_class, progress)
    risk, lost = _held_out_risk(held_out, settings.batch_size)
    skipped = distributed.all_reduce_sum(torch.tensor([spool.missing(), lost])).tolist()
    counts = {
        "memory/skipped": skipped[0],
        "memory/skipped_held_out": skipped[1],
        "memory/batches": len(plan),
    }
    return Passed(spool, risk, counts, reused)


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


def _pass_over(reading: _Reading, plan: Plan, spool: Spool, limit: int, progress: Progress) -> int:
    """Pass what is left of the split into the spool; how many batches had been finished."""
    data = reading.data

    def still_missing(positions: Tensor) -> bool:
        places = plan.places[positions.numpy()]
        again = explicit_batches(
            data.reader, data.modality, [places], quarantine=reading.quarantine
        )
        return not len(places) or all(batch is None for _, batch in again)

    finished = spool.take_up(still_missing).numpy()
    kept = torch.from_numpy(choose_by_key(data, plan, limit))
    numbers = plan.share(finished).tolist()
    parts = [plan.batch(number) for number in numbers]
    done = int(np.diff(plan.bounds)[finished].sum())
    progress(done, len(kept))

    def take(index: int, said: _Said) -> None:
        nonlocal done
        (left, labels, output), places = said, parts[index]
        begin = int(plan.bounds[numbers[index]])
        positions = begin + torch.from_numpy(np.searchsorted(places, left))
        missing = begin + torch.from_numpy(np.flatnonzero(~np.isin(places, left)))
        features = output.features.float().cpu()
        spool.add(
            PassedBatch(numbers[index], positions, labels, features, kept[positions], missing)
        )
        # Ranks have equal shares, so this one's count stands for all.
        done += len(places) * distributed.world_size()
        progress(min(done, len(kept)), len(kept))

    try:
        reading.take_together(parts, plan.largest_share(finished), take)
        distributed.run_together(spool.flush)
    except CmkdError:
        with suppress(CmkdError):  # the first failure is the one to tell
            spool.flush()
        raise
    return len(finished)


def _held_out_risk(reading: _Reading, batch_size: int) -> tuple[Moments, int]:
    """This rank's share of the split: cross-entropy in nats by class, and samples left out."""
    risk = Moments(len(reading.data.label_names), 1, of="losses")
    plan, none = Plan.make(reading.data, batch_size), np.zeros(0, dtype=np.int64)
    parts = [plan.batch(number) for number in plan.share(none)]
    lost = 0

    def take(index: int, said: _Said) -> None:
        nonlocal lost
        left, labels, output = said
        logits = output.logits.cpu().double()
        risk.update(functional.cross_entropy(logits, labels, reduction="none")[:, None], labels)
        lost += len(parts[index]) - len(left)

    reading.take_together(parts, plan.largest_share(none), take)
    return risk, lost
