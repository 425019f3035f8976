"""A memory that follows a teacher in motion (trained along, or a moving average).

Between two passes the features that the teacher gives are assigned to the nearest prototype of
their class and summed; a pass moves every prototype to the mean of what it was given. That is
one step of Lloyd's algorithm from where the prototypes are, so they keep their numbers, and
potentials stay those of the same prototypes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import compress, concatenate
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.memory.sync import merge_moments

_ROWS = 4096  # prototypes whose soft labels are made at a time


class MovingMemory:
    """A memory and what its teacher has shown since the last pass."""

    def __init__(self, memory: PrototypeMemory, *, every: int) -> None:
        """Start from a memory as it was built; ``every`` observations make a pass."""
        self.memory = memory
        self.every = every
        self._observed = 0
        self._start_again()

    @property
    def due(self) -> bool:
        """Whether it is time for a pass; the same on every rank."""
        return self._observed >= self.every

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Take in this rank's batch of the teacher: features [n, D], labels [n]; no collective.

        Samples of classes without prototypes are passed over.

        Raises:
            IntegrityError: a feature is not finite.
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
            self._moments.update(torch.cat([rows, distance.unsqueeze(1)], 1), nearest + first)
        self._observed += 1

    def follow(self, head_weight: Tensor, head_bias: Tensor) -> PrototypeMemory:
        """Make a pass and return the moved memory; a collective call.

        Prototypes that were given nothing stay where they are, at mass 0 if their class was
        seen. Soft labels are those of the head at the prototypes: of a cell's mean, not their
        mean over the cell. Held-out risk and low-rank factors stay as they were built.

        Args:
            head_weight: [C, D] the teacher's head now.
            head_bias: [C]
        """
        memory, moments = self.memory, self._moments
        merge_moments(moments)
        means = moments.mean().float()
        given = moments.count > 0
        prototypes = torch.where(given.unsqueeze(1), means[:, :-1], memory.prototypes)
        by_class = torch.zeros_like(memory.class_count)
        by_class.index_add_(0, memory.prototype_class, moments.count)
        seen = by_class > 0
        share = moments.count / by_class[memory.prototype_class].clamp(min=1)
        seen_rows = seen[memory.prototype_class]
        per_class = Moments(len(memory.class_names), memory.feature_dim + 1)
        per_class.add_rows(memory.prototype_class, *moments.tensors())
        head_weight, head_bias = (
            head_weight.detach().float().cpu(),
            head_bias.detach().float().cpu(),
        )
        soft = concatenate(
            [
                compress(
                    torch.softmax((rows @ head_weight.T + head_bias) / memory.temperature, 1),
                    memory.soft_label_values.shape[1],
                )
                for rows in prototypes.split(_ROWS)
            ]
        )
        self.memory = replace(
            memory,
            prototypes=prototypes,
            prototype_mass=torch.where(seen_rows, share.float(), memory.prototype_mass),
            radius=torch.where(given, means[:, -1], memory.radius),
            class_mean=torch.where(
                seen.unsqueeze(1), per_class.mean()[:, :-1].float(), memory.class_mean
            ),
            class_variance=torch.where(
                seen.unsqueeze(1), per_class.variance()[:, :-1].float(), memory.class_variance
            ),
            soft_label_values=soft.values,
            soft_label_classes=soft.classes,
            soft_label_rest=soft.rest,
            head_weight=head_weight,
            head_bias=head_bias,
        )
        self._observed = 0
        self._start_again()
        return self.memory

    def _start_again(self) -> None:
        counts = torch.bincount(self.memory.prototype_class, minlength=len(self.memory.class_names))
        self._starts = [0, *torch.cumsum(counts, 0).tolist()]
        # One column more, for the distance.
        self._moments = Moments(len(self.memory.prototypes), self.memory.feature_dim + 1)
