"""One pass of the frozen teacher over its data, into a spool that outlives a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
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
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput
from cmkd_scale.stages.common import Trained, weights_digest
from cmkd_scale.stages.pass_plan import Plan, choose_by_key
from cmkd_scale.stages.streams import SplitData, open_quarantine

PASS = "pass"
"""Directory of the run that holds what has passed the teacher, until the memory is saved."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Passed:
    """What the teacher has left."""

    spool: Spool
    risk: Moments
    metrics: dict[str, int]


def run_pass(
    trained: Trained,
    data: SplitData,
    held_out: SplitData,
    config: Config,
    directory: Path,
    device: torch.device,
    progress: Progress,
) -> Passed:
    """The teacher's pass over its data and over held-out data; a collective call.

    Args:
        trained: the teacher, in eval mode on ``device``.
        data: what it was trained on.
        held_out: what it was not.
        config: of the run.
        directory: of the run; what an earlier try has left there is taken up.
        device: where to compute.
        progress: told samples done, and how many there are.

    Raises:
        IntegrityError: more samples are damaged than allowed, or the teacher has diverged.
        UsageError: the spool cannot be written.
    """
    fraction, batch_size = config.data.max_bad_fraction, config.memory.batch_size
    skipped = open_quarantine(directory, data, fraction, len(data.labelled()))
    skipped_held_out = open_quarantine(directory, held_out, fraction, len(held_out.labelled()))
    identity = _identity(trained, data, config, device)
    spool = Spool(trained.model.head.in_features, directory / PASS, identity)
    plan = Plan.make(data, batch_size)
    reused = _pass_over(
        trained.model,
        data,
        plan,
        spool,
        device,
        limit=config.memory.max_samples_per_class,
        quarantine=skipped,
        progress=progress,
    )
    risk = _held_out_risk(trained.model, held_out, batch_size, device, quarantine=skipped_held_out)
    metrics = {
        "memory/skipped": len(skipped),
        "memory/skipped_held_out": len(skipped_held_out),
        "memory/batches": len(plan),
        "memory/batches_reused": reused,
    }
    return Passed(spool, risk, metrics)


def _identity(trained: Trained, data: SplitData, config: Config, device: torch.device) -> str:
    """What parts of a pass must have in common to be of one; the order of shards has no part."""
    manifest, settings = data.reader.manifest, config.memory
    about = {
        "teacher": weights_digest(trained.model),
        "transform": trained.spec.transform,
        "shards": sorted(shard.sha256 for shard in manifest.shards),
        "label_names": data.label_names,
        "label_index": data.reader.label_index,
        "batch_size": settings.batch_size,
        "max_samples_per_class": settings.max_samples_per_class,
        "device": device.type,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()


def _pass_over(
    model: Model,
    data: SplitData,
    plan: Plan,
    spool: Spool,
    device: torch.device,
    *,
    limit: int,
    quarantine: Quarantine,
    progress: Progress,
) -> int:
    """Pass what is left of the split into the spool; how many batches had been finished."""

    def still_missing(positions: Tensor) -> bool:
        places = plan.places[positions.numpy()]
        again = explicit_batches(data.reader, data.modality, [places], quarantine=quarantine)
        return not len(places) or all(batch is None for _, batch in again)

    finished = spool.take_up(still_missing).numpy()
    kept = torch.from_numpy(choose_by_key(data, plan, limit))
    numbers = plan.share(finished)
    done = int(np.diff(plan.bounds)[finished].sum())
    progress(done, len(kept))
    parts = [plan.batch(number) for number in numbers]
    for number, (left, labels, output) in zip(
        numbers.tolist(), _forward(model, data, parts, device, quarantine), strict=True
    ):
        places = plan.batch(number)
        begin = int(plan.bounds[number])
        positions = begin + torch.from_numpy(np.searchsorted(places, left))
        missing = begin + torch.from_numpy(np.flatnonzero(~np.isin(places, left)))
        features = output.features.float().cpu()
        spool.add(PassedBatch(number, positions, labels, features, kept[positions], missing))
        # Ranks have equal shares, so this one's count stands for all.
        done += len(places) * distributed.world_size()
        progress(min(done, len(kept)), len(kept))
    spool.flush()
    quarantine.share(data.reader)
    return len(finished)


def _held_out_risk(
    model: Model,
    data: SplitData,
    batch_size: int,
    device: torch.device,
    *,
    quarantine: Quarantine,
) -> Moments:
    """Cross-entropy in nats on this rank's share of the split, by class."""
    risk = Moments(len(data.label_names), 1)
    plan = Plan.make(data, batch_size)
    parts = [plan.batch(number) for number in plan.share(np.zeros(0, dtype=np.int64))]
    for _, labels, output in _forward(model, data, parts, device, quarantine):
        logits = output.logits.cpu().double()
        risk.update(functional.cross_entropy(logits, labels, reduction="none")[:, None], labels)
    quarantine.share(data.reader)
    return risk


def _forward(
    model: Model,
    data: SplitData,
    parts: list[NDArray[np.int64]],
    device: torch.device,
    quarantine: Quarantine,
) -> Iterator[tuple[NDArray[np.int64], Tensor, ModelOutput]]:
    """What the model says of each part: places that are left, their labels, output."""
    head = model.head
    nothing = ModelOutput(torch.zeros(0, head.in_features), torch.zeros(0, head.out_features), ())
    for left, batch in explicit_batches(
        data.reader, data.modality, parts, quarantine=quarantine, workers=data.workers
    ):
        if batch is None:
            yield left, torch.zeros(0, dtype=torch.int64), nothing
            continue
        with torch.no_grad():
            output = model(batch.inputs.to(device))
        yield left, batch.labels, output
