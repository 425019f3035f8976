"""One pass of a model over some samples, this rank's share of them, without gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.data.loader import ordered_batches
from cmkd_scale.errors import PreemptedError
from cmkd_scale.models.model import Model
from cmkd_scale.records import Batch, ModelOutput
from cmkd_scale.stages.meetings import in_meetings
from cmkd_scale.stages.streams import SplitData
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

BATCH_SIZE = 128

Take = Callable[[NDArray[np.int64], Batch, ModelOutput], None]
"""(places [n], batch, what the model says of it)."""


@torch.no_grad()
def forward_pass(
    model: Model,
    data: SplitData,
    places: NDArray[np.int64],
    take: Take,
    *,
    device: torch.device,
    quarantine: Quarantine,
    preemption: Preemption,
    watchdog: Watchdog,
    phase: str,
    stopped: str,
    step: int = 0,
) -> None:
    """Give ``take`` what a model says of this rank's share of ``places``; a collective call.

    Args:
        model: on ``device``; put into eval mode.
        data: the split.
        places: of the samples, each once.
        take: called for each batch.
        device: where to compute.
        quarantine: counts damaged samples; its ranks have shared them when this returns.
        preemption: watched between batches.
        watchdog: told where the pass stands.
        phase: that it is told.
        stopped: what a signal means for the user, for the message.
        step: that batches are counted on from, for the watchdog.

    Raises:
        PreemptedError: on all ranks: one was signalled.
        IntegrityError: more of the samples are damaged than allowed.
    """
    model.eval()
    world = distributed.world_size()
    batches = ordered_batches(
        data.reader,
        data.modality,
        places,
        batch_size=BATCH_SIZE,
        rank=distributed.rank(),
        world_size=world,
        workers=data.workers,
        quarantine=quarantine,
    )

    def one(item: tuple[NDArray[np.int64], Batch]) -> None:
        where, batch = item
        take(where, batch, model(batch.inputs.to(device)))

    most = -(-len(places) // (BATCH_SIZE * world))
    for _ in in_meetings(
        batches, most, one, preemption=preemption, watchdog=watchdog, phase=phase, step=step
    ):
        if preemption.agreed():
            raise PreemptedError(stopped)
    quarantine.share(data.reader)
