"""Run by the ranks of a run: ``cmkd``, slowly, with batches whose loss is no number.

``slow_run.py FIRST LAST WORDS...``: batches FIRST to LAST of the stream, counted from 0, are
spoilt; none if LAST is lower.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any
from unittest.mock import patch

import torch

from cmkd_scale.cli import program
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.records import Batch
from cmkd_scale.training import loop
from cmkd_scale.training.distillation import Distillation, StepResult
from cmkd_scale.training.schedule import learning_rate_at

STEP_SECONDS = 0.1
FIRST, LAST = int(sys.argv[1]), int(sys.argv[2])

batches, forward = TrainLoader.batches, Distillation.forward
bad = False


def watched(self: TrainLoader) -> Generator[Batch, None, None]:
    global bad
    for batch in batches(self):
        bad = FIRST <= self.delivered // self.global_batch_size - 1 <= LAST
        yield batch


def spoilt(self: Distillation, *arguments: Any) -> StepResult:
    result = forward(self, *arguments)
    return result._replace(loss=result.loss * torch.nan) if bad else result


def slowly(*arguments: Any) -> float:
    time.sleep(STEP_SECONDS)
    return learning_rate_at(*arguments)


with (
    patch.object(TrainLoader, "batches", watched),
    patch.object(Distillation, "forward", spoilt),
    patch.object(loop, "learning_rate_at", slowly),
):
    program(sys.argv[3:])
