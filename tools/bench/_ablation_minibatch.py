"""Transport without a memory: to a minibatch of the teacher's features, drawn blind to classes.

What the released code of Tran et al. 2026 (arXiv 2606.10504) aligns with in each step, reduced
to its transport: 64 features of the teacher's training data, entropic optimal transport between
the two minibatches with an epsilon of 0.1 of their mean cost and at most 100 iterations. The
teacher's forward passes are made once, ahead of training; nothing is paired.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmkd_scale.losses.sinkhorn import pairwise_distance
from cmkd_scale.losses.transport_solver import sinkhorn
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.stages import through_faults
from cmkd_scale.stages.common import load_trained, open_split_for, start_engine
from cmkd_scale.stages.evaluate import infer
from cmkd_scale.stages.streams import open_quarantine
from cmkd_scale.training.live_teacher import Values
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.targets import MemoryTargets
from cmkd_scale.training.watchdog import Watchdog

TEACHER_BATCH = 64
EPSILON = 0.1
"""Of the mean cost of a pair of minibatches."""


class TeacherFeatures(NamedTuple):
    """The teacher's training data, seen by the teacher."""

    features: Tensor
    """[N, D]"""
    labels: Tensor
    """[N] int64, of which nothing but a measure is made."""


class MinibatchTargets(MemoryTargets):
    """A memory of which the unit of cost and the head are used, and no prototype."""

    teacher_features: Tensor
    teacher_labels: Tensor

    def __init__(self, memory: PrototypeMemory, *, taught: TeacherFeatures, **given: Any) -> None:
        """As ``MemoryTargets``, and the features to draw from."""
        super().__init__(memory, **given)
        self.register_buffer("teacher_features", taught.features, persistent=False)
        self.register_buffer("teacher_labels", taught.labels, persistent=False)

    def _move(
        self, features: Tensor, labels: Tensor, share: Tensor, step: int, values: Values
    ) -> Tensor:
        # The loop seeds torch's generator by the step, so a run that goes on draws the same.
        drawn = torch.randperm(len(self.teacher_features))[:TEACHER_BATCH]
        cost, plan = minibatch_plan(features, self.teacher_features[drawn], self.cost_scale)
        # Rows of the plan have a mass of 1 / B, and the loss is a mean over samples.
        transported = len(features) * (plan * cost).sum(1)
        values["transported"] = transported
        others = self.teacher_labels[drawn] != labels.unsqueeze(1)
        wrong = len(features) * (plan * others).sum()
        nothing = features.new_zeros(len(self.potentials.value) + self.potentials.classes)
        sums = torch.stack([transported.detach() @ share, wrong, share.sum()])
        return torch.cat([nothing, sums])


def minibatch_plan(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cost, with gradient in x, and entropic plan between two minibatches of equal masses.

    Args:
        x: [B, D] student features.
        y: [N, D] teacher features.
        scale: unit of the cost.

    Returns:
        Distances over ``scale`` [B, N], and the plan [B, N] of total mass 1, a constant.
    """
    cost = pairwise_distance(x, y) / scale
    solved = sinkhorn(
        cost.detach(),
        torch.full((len(x),), 1.0 / len(x)),
        torch.full((len(y),), 1.0 / len(y)),
        epsilon=EPSILON * float(cost.detach().mean()),
        iterations=100,
    )
    return cost, solved.plan


def teacher_features(run: Path, file: Path) -> TeacherFeatures:
    """What the teacher of ``run`` makes of its training data; kept in ``file``."""
    if not file.exists():
        trained = load_trained(run, "teacher")
        data = open_split_for(trained, trained.config, trained.config.data.train_split)
        quarantine = open_quarantine(file.parent, data, data.max_bad_fraction, len(data.labelled()))
        device = start_engine(trained.config).device
        with Preemption() as preemption, Watchdog(0, directory=file.parent) as watchdog:
            _, labels, features, _ = infer(
                trained.model.to(device),
                data,
                device,
                quarantine=quarantine,
                preemption=preemption,
                watchdog=watchdog,
            )
        save_file({"features": features, "labels": labels}, file)
    return TeacherFeatures(**load_file(file))


@contextmanager
def minibatch_transport(taught: TeacherFeatures) -> Iterator[None]:
    """Students that are trained inside move to minibatches of ``taught``."""
    with patch.object(through_faults, "MemoryTargets", partial(MinibatchTargets, taught=taught)):
        yield
