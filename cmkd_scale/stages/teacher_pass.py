"""One pass of the frozen teacher over its data, into a spool that outlives a kill."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale import distributed
from cmkd_scale.errors import CmkdError
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.stages.pass_identity import parts_identity
from cmkd_scale.stages.pass_plan import Plan, choose_by_key
from cmkd_scale.stages.reading import Progress, Reading, Said, Start

PASS = "pass"
"""Directory of the run that holds what has passed the teacher, until there are results."""


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


def run_pass(
    start: Start, reading: Reading, held_out: Reading, identity: str, progress: Progress
) -> Passed:
    """The teacher's pass over its data and over held-out data; a collective call.

    Whatever ends it early, the batches that have passed are in parts.

    Args:
        start: what passes where.
        reading: what the teacher was trained on.
        held_out: what it was not.
        identity: of the pass; parts of it that an earlier try has left are taken up.
        progress: told samples done, and how many there are.

    Raises:
        PreemptedError: a signal asked for a stop.
        IntegrityError: more samples are damaged than allowed, or the teacher has diverged.
        UsageError: the spool cannot be written.
    """
    settings = start.config.memory
    shared = parts_identity(identity, reading.machines)
    spool = Spool(start.trained.model.head.in_features, start.directory / PASS, shared)
    plan = Plan.make(reading.data, settings.batch_size)
    reused = _pass_over(reading, plan, spool, settings.max_samples_per_class, progress)
    risk, lost = _held_out_risk(held_out, settings.batch_size)
    skipped = distributed.all_reduce_sum(torch.tensor([spool.missing(), lost])).tolist()
    counts = {
        "memory/skipped": skipped[0],
        "memory/skipped_held_out": skipped[1],
        "memory/batches": len(plan),
    }
    return Passed(spool, risk, counts, reused)


def _pass_over(reading: Reading, plan: Plan, spool: Spool, limit: int, progress: Progress) -> int:
    """Pass what is left of the split into the spool; how many batches had been finished."""
    data = reading.data

    def still_missing(positions: Tensor) -> bool:
        return reading.still_missing(plan.places[positions.numpy()])

    finished = spool.take_up(still_missing).numpy()
    kept = torch.from_numpy(choose_by_key(data, plan, limit))
    numbers = plan.share(finished).tolist()
    parts = [plan.batch(number) for number in numbers]
    done = int(np.diff(plan.bounds)[finished].sum())
    progress(done, len(kept))

    def take(index: int, said: Said) -> None:
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


def _held_out_risk(reading: Reading, batch_size: int) -> tuple[Moments, int]:
    """This rank's share of the split: cross-entropy in nats by class, and samples left out."""
    risk = Moments(len(reading.data.label_names), 1, of="losses")
    plan, none = Plan.make(reading.data, batch_size), np.zeros(0, dtype=np.int64)
    parts = [plan.batch(number) for number in plan.share(none)]
    lost = 0

    def take(index: int, said: Said) -> None:
        nonlocal lost
        left, labels, output = said
        logits = output.logits.float().cpu().double()
        risk.update(functional.cross_entropy(logits, labels, reduction="none")[:, None], labels)
        lost += len(parts[index]) - len(left)

    reading.take_together(parts, plan.largest_share(none), take)
    return risk, lost
