"""A memory that follows a teacher in motion (trained along, or a moving average).

Between two passes the features that the teacher gives are assigned to the nearest prototype of
their class and summed; a pass moves every prototype towards the mean of what it was given. That
is mini-batch k-means (Sculley 2010) from where the prototypes are, so they keep their numbers,
and potentials stay those of the same prototypes. A window of few samples moves little: the
memory counts for as many samples as it was built from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.covariance import within_variance
from cmkd_scale.memory.soft_labels import head_says
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.memory.sync import merge_moments


class MovingMemory:
    """A memory and what its teacher has shown since the last pass."""

    def __init__(
        self, memory: PrototypeMemory, *, every: int, weight_of_before: float = 1.0
    ) -> None:
        """Start from a memory as it was built.

        Args:
            memory: aligned to the labels that will be observed.
            every: observations that make a pass.
            weight_of_before: what each of the ``class_kept`` samples of a class counts at a pass,
                beside 1 for a new one. At 0 what was is forgotten: a pass is then one step of
                Lloyd's algorithm.
        """
        self.memory = memory
        self.every = every
        self.weight_of_before = weight_of_before
        self._observed = 0
        counts = torch.bincount(memory.prototype_class, minlength=len(memory.class_names))
        self._known = counts > 0
        self._starts = [0, *torch.cumsum(counts, 0).tolist()]
        # One column more, for the distance.
        self._window = Moments(
            len(memory.prototypes), memory.feature_dim + 1, parts=distributed.world_size()
        )

    @property
    def due(self) -> bool:
        """Whether it is time for a pass; the same on every rank."""
        return self._observed >= self.every

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in this rank's batch of the teacher: features [n, D], labels [n]; no collective.

        Samples of classes without prototypes are passed over.

        Raises:
            IntegrityError: a feature is not finite or too large.
        """
        features, labels = features.detach().float().cpu(), labels.cpu()
        for label in labels.unique().tolist():
            first, last = self._starts[label], self._starts[label + 1]
            if first == last:
                continue
            rows = features[labels == label]
            # By pairs: a matrix product's last bits depend on how samples are split over ranks.
            apart = torch.cdist(
                rows,
                self.memory.prototypes[first:last],
                compute_mode="donot_use_mm_for_euclid_dist",
            )
            distance, nearest = apart.min(1)
            self._window.update(torch.cat([rows, distance.unsqueeze(1)], 1), nearest + first)
        self._observed += 1

    def follow(self, head_weight: Tensor, head_bias: Tensor) -> PrototypeMemory:
        """Make a pass and return the moved memory; a collective call.

        Prototypes that were given nothing stay where they are and lose mass to the others of
        their class; classes that were not seen stay as they were. Soft labels are those of the
        head at the prototypes: of a cell's mean, not their mean over the cell. The unit of cost
        changes as the mean radius does; distances are to where prototypes were before the pass,
        so after a leap both are right a pass later. Held-out risk, counts, and low-rank factors
        stay as they were built, but for factors that would exceed the variance.

        Args:
            head_weight: [C, D] the teacher's head now, in the memory's classes.
            head_bias: [C]
        """
        memory = self.memory
        merge_moments(self._window)
        prototypes, mass, radius = self._moved_prototypes()
        class_mean, class_variance = self._moved_classes()
        soft = head_says(
            prototypes,
            head_weight.detach().float().cpu(),
            head_bias.detach().float().cpu(),
            memory.temperature,
            keep=memory.soft_label_values.shape[1],
            known=self._known,
        )
        before, after = (memory.radius * memory.prototype_mass).sum(), (radius * mass).sum()
        growth = after / before if float(before) > 0.0 else torch.ones(())
        self.memory = replace(
            memory,
            prototypes=prototypes,
            prototype_mass=mass,
            radius=radius,
            class_mean=class_mean,
            class_variance=class_variance,
            class_factor=within_variance(memory.class_factor, class_variance),
            soft_label_values=soft.values,
            soft_label_classes=soft.classes,
            soft_label_rest=soft.rest,
            head_weight=head_weight.detach().float().cpu(),
            head_bias=head_bias.detach().float().cpu(),
            cost_scale=(memory.cost_scale * growth).clamp(min=1e-6),
        )
        self._observed = 0
        # In place: sums of many prototypes take gigabytes, and there is no room for them twice.
        for sums in self._window.tensors():
            sums.zero_()
        return self.memory

    def _moved_prototypes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prototypes [J, D], masses [J] and radii [J] after the window."""
        memory, own = self.memory, self.memory.prototype_class
        before, counts = self._samples_before(), self._samples_now()
        part = _part(self._window.count, before[own] * memory.prototype_mass).float()
        means = self._window.mean().float()
        prototypes = memory.prototypes.lerp(means[:, :-1], part.unsqueeze(1))
        radius = memory.radius.lerp(means[:, -1], part)
        share = self._window.count / counts[own].clamp(min=1)
        mass = memory.prototype_mass.lerp(share.float(), _part(counts, before)[own].float())
        return prototypes, mass, radius

    def _moved_classes(self) -> tuple[Tensor, Tensor]:
        """Means and variances [C, D] after the window (Chan, Golub and LeVeque 1983)."""
        memory = self.memory
        window = Moments(len(memory.class_names), memory.feature_dim + 1)
        window.add_rows(memory.prototype_class, *self._window.tensors())
        part = _part(window.count, self._samples_before()).unsqueeze(1)
        mean, variance = memory.class_mean.double(), memory.class_variance.double()
        apart = window.mean()[:, :-1] - mean
        variance = variance.lerp(window.variance()[:, :-1], part)
        variance += part * (1.0 - part) * apart.square()
        return (mean + part * apart).float(), variance.float()

    def _samples_before(self) -> Tensor:
        """[C] float64 samples that the memory counts for."""
        return self.weight_of_before * self.memory.class_kept.double()

    def _samples_now(self) -> Tensor:
        """[C] int64 samples in the window."""
        counts = torch.zeros_like(self.memory.class_count)
        return counts.index_add_(0, self.memory.prototype_class, self._window.count)


def _part(now: Tensor, before: Tensor) -> Tensor:
    """What samples ``now`` are of all, float64; 0 where there are none."""
    return now / (now + before).clamp(min=1e-12)
