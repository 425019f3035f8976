"""Ways from a student's features to its teachers', and what it takes over at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmkd_scale.losses.precision import at_least_float
from cmkd_scale.models.model import Model
from cmkd_scale.training.live_teacher import SampleTeacher
from cmkd_scale.training.method import Method
from cmkd_scale.training.targets import MemoryTargets


def place_for_own_space(width: int, teachers: Sequence[int]) -> int | None:
    """Which teacher (their widths) the student shares its space with: the first of its own."""
    return teachers.index(width) if width in teachers else None


def shares_of(targets: Sequence[MemoryTargets], trust: Sequence[float]) -> Tensor:
    """[M, C] weight of each of M memories for each class.

    Among those that know the class, in proportion to how far each is trusted (``trust`` [M]), and
    all together as much as the one that is trusted most: full trust in all means equal parts.
    """
    known = torch.stack([target.shared_classes for target in targets]).double()
    trusted = known * torch.tensor(trust, dtype=torch.float64).unsqueeze(1)
    most = trusted.max(0).values
    return (trusted * most / trusted.sum(0).clamp(min=1e-300)).float()


def make_projectors(
    model: Model,
    targets: Sequence[MemoryTargets],
    live: SampleTeacher | None,
    method: Method,
) -> nn.ModuleList:
    """From the student's features to each teacher's, memories first."""
    width = model.head.in_features
    widths = [target.feature_dim for target in targets]
    reads = [target.reads_features for target in targets]
    if live is not None:
        widths.append(live.feature_dim)
        # What inner steps alone read is forgotten after each step, and never learns.
        reads.append(
            method.update == "joint" and bool(method.values & {"projected", "teacher_logits"})
        )
    own = place_for_own_space(width, widths)
    projectors = nn.ModuleList(
        nn.Identity() if number == own else make_projector(width, out)
        for number, out in enumerate(widths)
    )
    for projector, read in zip(projectors, reads, strict=True):
        # One that no loss reads has no gradient, which DDP would wait for.
        projector.requires_grad_(read)
    return projectors


class Projector(nn.Linear):
    """A linear map in float32, whatever type a sharded model gathers its weights in."""

    def forward(self, features: Tensor) -> Tensor:
        """[., width] to [., out]."""
        weight, bias = at_least_float(self.weight), at_least_float(self.bias)
        return nn.functional.linear(at_least_float(features), weight, bias)


def make_projector(width: int, out: int) -> Projector:
    """From the student's features [., width] to a teacher's space [., out].

    It starts as an isometry (Saxe et al. 2014), scaled so that features keep the mean
    square of their entries, which the models' last LayerNorm sets to 1 on both sides.
    """
    linear = Projector(width, out)
    nn.init.orthogonal_(linear.weight, gain=math.sqrt(max(1.0, out / width)))
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def transfer_head(model: Model, heads: list[tuple[Tensor, Tensor]], class_share: Tensor) -> None:
    """Start the head as the teachers' where they know the class; a mean if several do."""
    known = class_share.sum(0) > 0
    part = class_share / class_share.sum(0).clamp(min=1e-12)
    weight = sum(share.unsqueeze(1) * head for share, (head, _) in zip(part, heads, strict=True))
    bias = sum(share * offset for share, (_, offset) in zip(part, heads, strict=True))
    model.head.weight[known] = weight[known].to(model.head.weight.dtype)
    model.head.bias[known] = bias[known].to(model.head.bias.dtype)
