"""Dual potentials of the global transport problem, which live beside the memory.

Semi-dual optimal transport (Genevay et al. 2016; Seguy et al. 2018) between the student's
features and the teacher's prototypes: one potential a prototype, raised while the prototype
receives less mass than it should. What a batch sends is summed over ranks as one vector, so the
potentials are the same on every rank, and to rounding for every number of them.

Within a class (class-masked transport) masses are shares of the class, and follow the student's
class marginal by themselves. Across classes the target mass of a prototype is its share times
the student's class marginal (``reweight``), without which a label shift would have to move mass
into other classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Optimizer = Literal["sgd", "averaged"]
_HORIZON = 100  # updates that averages span: of potentials, and of masses for the marginal error
_ENOUGH = 8.0
"""Samples of a class in a batch at which a step is half as long as it may be: the masses that one
or two samples send say next to nothing, and a full step after them would only add noise."""
_FARTHEST = 5.0  # of potentials, in units of rho: beyond it, masses give way no further
_NOTHING = 1e-6  # samples: what is left of a class that has long been out of sight


class Potentials(nn.Module):
    """Potentials [J] in units of the cost; part of a checkpoint, equal on every rank."""

    value: Tensor
    average: Tensor
    updates: Tensor
    seen: Tensor
    recent: Tensor
    mass: Tensor
    prototype_class: Tensor
    teacher_marginal: Tensor

    def __init__(
        self,
        prototype_mass: Tensor,
        prototype_class: Tensor,
        class_count: Tensor,
        *,
        rate: float,
        optimizer: Optimizer = "averaged",
        relaxation: float = math.inf,
        reweight: bool = True,
    ) -> None:
        """Start at zero.

        Args:
            prototype_mass: [J] share of its class, sums to 1 within a class.
            prototype_class: [J] int64.
            class_count: [C] int64 samples of the teacher.
            rate: step size of the dual ascent, in units of the cost.
            optimizer: plain steps, or plain steps of which the average is used (Polyak and
                Juditsky 1992).
            relaxation: rho of the unbalanced problem; infinity keeps the masses exactly.
            reweight: whether target masses follow the student's class marginal.
        """
        super().__init__()
        self.classes = len(class_count)
        self.rate = rate
        self.optimizer = optimizer
        self.relaxation = relaxation
        self.reweight = reweight
        self.register_buffer("value", torch.zeros_like(prototype_mass))
        # Samples of each class that the student has shown, all ranks.
        self.register_buffer("seen", torch.zeros(self.classes, dtype=torch.float64))
        # What was sent lately: the noise of single batches would hide the marginal error.
        self.register_buffer("recent", torch.zeros(len(prototype_mass) + self.classes))
        if optimizer == "averaged":
            self.register_buffer("average", torch.zeros_like(prototype_mass))
            self.register_buffer("updates", torch.zeros(self.classes, dtype=torch.int64))
        self.register_buffer("mass", prototype_mass.clone(), persistent=False)
        self.register_buffer("prototype_class", prototype_class.clone(), persistent=False)
        self.register_buffer("teacher_marginal", _shares(class_count), persistent=False)
        self.known = int((class_count > 0).sum())

    @property
    def current(self) -> Tensor:
        """[J] the potentials that a plan is made with."""
        return self.average if self.optimizer == "averaged" else self.value

    @property
    def ascending(self) -> Tensor | None:
        """[J] the potentials that ascend, if they are others than ``current``.

        The mass that they would send is what they are to answer for: fed with that of their
        average, they would swing.
        """
        return self.value if self.optimizer == "averaged" else None

    def follow(self, prototype_mass: Tensor) -> None:
        """Take up the masses of a memory whose teacher has moved; [J] as before."""
        self.mass.copy_(prototype_mass)

    def class_marginal(self) -> Tensor:
        """[C] the student's share of each class that the memory knows, or the teacher's."""
        if not self.reweight:
            return self.teacher_marginal
        # One sample of the teacher's marginal as a prior: before the first batch, that is all.
        counts = self.seen.to(self.mass.dtype) * (self.teacher_marginal > 0)
        return (counts + self.teacher_marginal) / (counts.sum() + 1.0)

    def target(self) -> Tensor:
        """[J] mass that each prototype should receive of all samples; sums to 1."""
        return self._by_prototype(self.class_marginal()) * self.mass

    def sent_within_classes(
        self, plan: Tensor, columns: Tensor, labels: Tensor, share: Tensor
    ) -> Tensor:
        """What this rank's batch sends: [J + C], to prototypes, then samples of each class.

        Args:
            plan: [B, K] share of each sample sent to each of its candidates.
            columns: [B, K] int64 prototype of each entry (any where the plan is 0).
            labels: [B] int64.
            share: [B] weight of each sample; 0 if the memory lacks its class.
        """
        sums = plan.new_zeros(len(self.value) + self.classes)
        sums.index_add_(0, columns.flatten(), (plan * share.unsqueeze(1)).flatten())
        sums.index_add_(0, labels + len(self.value), share.to(plan.dtype))
        return sums

    def sent_to_all(self, plan: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        """The same for a plan [B, J] over all prototypes."""
        counts = plan.new_zeros(self.classes).index_add_(0, labels, share.to(plan.dtype))
        return torch.cat([share.to(plan.dtype) @ plan, counts])

    @torch.no_grad()
    def observe(self, sent: Tensor) -> None:
        """Count the samples of a batch of all ranks, for the student's class marginal."""
        self.seen += sent[len(self.value) :]
        self.recent.mul_(1.0 - 1.0 / _HORIZON).add_(sent)
        # Numbers below float32's smallest would fade no further, and their reciprocal overflow.
        self.recent.masked_fill_(self.recent < 1e-12, 0.0)

    @torch.no_grad()
    def marginal_error(self, *, within_classes: bool) -> Tensor:
        """[] L1 distance of the masses received lately to those wanted.

        The mean over the classes seen, or of the whole. Lately: over some 100 batches, the older
        the less. It is about the mass as it was sent while potentials moved; at a rate so large
        that they jitter, the error of any one of them is larger.
        """
        received, counts = self.recent[: len(self.value)], self.recent[len(self.value) :]
        if within_classes:
            seen = counts > _NOTHING
            per_sample = self._by_prototype(torch.where(seen, 1.0 / counts, 0.0))
            wanted = self._relaxed(self.mass) * self._by_prototype(seen.to(self.mass.dtype))
            return (wanted - received * per_sample).abs().sum() / seen.sum().clamp(min=1)
        wanted = self._relaxed(self.target())
        return (wanted - received / counts.sum().clamp(min=_NOTHING)).abs().sum()

    @torch.no_grad()
    def update(self, sent: Tensor, *, within_classes: bool) -> None:
        """One step of dual ascent from the batch of all ranks.

        Args:
            sent: [J + C] summed over ranks.
            within_classes: whether masses are shares of a class.
        """
        received, counts = sent[: len(self.value)], sent[len(self.value) :]
        present = counts > 0
        if within_classes:
            part = received * self._by_prototype(torch.where(present, 1.0 / counts, 0.0))
            target = self._relaxed(self.mass)
            samples = counts
        else:
            part = received / counts.sum().clamp(min=1e-12)
            target = self._relaxed(self.target())
            samples = counts.sum() / self.known
            present = torch.ones_like(present) & (samples > 0)
            # In shares of a class of usual size, so that the rate means the same for any C.
            part, target = part * self.known, target * self.known
        rate = self.rate * (samples / (samples + _ENOUGH)) * present
        self.value += self._by_prototype(rate) * (target - part)
        if self.optimizer == "averaged":
            self.updates += present
            weight = present / self.updates.clamp(1, _HORIZON)
            self.average.lerp_(self.value, self._by_prototype(weight.to(self.value.dtype)))

    def _by_prototype(self, of_class: Tensor) -> Tensor:
        """[J] the value of each prototype's class; eight times as fast as indexing."""
        return of_class.index_select(0, self.prototype_class)

    def _relaxed(self, mass: Tensor) -> Tensor:
        """Masses that unbalanced transport asks for: less where a potential is high."""
        if math.isinf(self.relaxation):
            return mass
        return mass * torch.exp((-self.value / self.relaxation).clamp(-_FARTHEST, _FARTHEST))


def _shares(count: Tensor) -> Tensor:
    return (count.double() / count.sum().clamp(min=1)).float()
