"""Dual potentials of the global transport problem, which live beside the memory.

Semi-dual optimal transport (Genevay et al. 2016; Seguy et al. 2018) between the student's
features of a class and the teacher's prototypes of that class: one potential a prototype,
raised while the prototype receives less mass than the teacher gives it. Student and teacher
classes are the same on both sides, so masses follow the student's class marginal by
themselves (no mass can cross classes under label shift).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmkd_scale import distributed


class Potentials(nn.Module):
    """Potentials [J] in units of the cost scale; part of a checkpoint, equal on every rank."""

    value: Tensor
    mass: Tensor
    prototype_class: Tensor

    def __init__(
        self, prototype_mass: Tensor, prototype_class: Tensor, classes: int, rate: float
    ) -> None:
        """Start at zero.

        Args:
            prototype_mass: [J] share of its class, sums to 1 within a class.
            prototype_class: [J] int64.
            classes: number of classes C.
            rate: step size of the dual ascent.
        """
        super().__init__()
        self.classes = classes
        self.rate = rate
        self.register_buffer("value", torch.zeros_like(prototype_mass))
        self.register_buffer("mass", prototype_mass.clone(), persistent=False)
        self.register_buffer("prototype_class", prototype_class.clone(), persistent=False)

    def received(self, plan: Tensor, columns: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """Mass that this rank's batch sends: [J + C], prototypes then samples of each class.

        Args:
            plan: [B, K] share of each sample sent to each of its class's prototypes.
            columns: [B, K] int64 prototype of each entry (any where the plan is 0).
            labels: [B] int64.
            known: [B] bool, whether the memory has the sample's class.
        """
        sums = plan.new_zeros(len(self.value) + self.classes)
        sums.index_add_(0, columns.flatten(), (plan * known.unsqueeze(1)).flatten())
        sums.index_add_(0, labels + len(self.value), known.to(plan.dtype))
        return sums

    @torch.no_grad()
    def update(self, received: Tensor) -> Tensor:
        """One step of dual ascent from the batch of all ranks; returns the marginal error.

        Args:
            received: this rank's ``received``; summed over ranks in place.

        Returns:
            [] mean over the batch's classes of the L1 distance between the mass that
            prototypes received and the mass they should.
        """
        distributed.all_reduce_sum(received)
        sent, count = received[: len(self.value)], received[len(self.value) :]
        per_prototype = count[self.prototype_class]
        present = per_prototype > 0
        gap = torch.where(present, self.mass - sent / per_prototype.clamp(min=1.0), 0.0)
        self.value += self.rate * gap
        return gap.abs().sum() / (count > 0).sum().clamp(min=1)
