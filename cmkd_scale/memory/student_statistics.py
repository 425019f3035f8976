"""What is known of the student's features beyond the batch: class moments and a recent ring.

Both are fed with the batch of all ranks in its global order, so they are the same on every rank
and, to rounding, for every number of ranks; a checkpoint holds them once and any world size
takes them up. They describe a student that has moved on since: a row of the ring carries the
step at which it was written, and moments forget by ``decay`` a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StudentStatistics(nn.Module):
    """Class moments [C, D] and the R newest features of all ranks; part of a checkpoint."""

    weight: Tensor
    mean: Tensor
    variance: Tensor
    ring: Tensor
    ring_labels: Tensor
    ring_steps: Tensor
    written: Tensor

    def __init__(
        self, classes: int, dim: int, *, ring_size: int, decay: float, moments: bool = True
    ) -> None:
        """Start empty.

        Args:
            classes: number of classes C.
            dim: width D of the features.
            ring_size: features R that are kept.
            decay: what a sample's weight is multiplied with at every later step, 0 to 1; 1 never
                forgets.
            moments: whether class moments are kept.
        """
        super().__init__()
        self.decay = decay
        self.keeps_moments = moments
        classes, dim_of_moments = (classes, dim) if moments else (0, 0)
        self.register_buffer("weight", torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(classes, dim_of_moments))
        self.register_buffer("variance", torch.zeros(classes, dim_of_moments))
        self.register_buffer("ring", torch.zeros(ring_size, dim))
        self.register_buffer("ring_labels", torch.full((ring_size,), -1))
        self.register_buffer("ring_steps", torch.zeros(ring_size, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, step: int) -> None:
        """Take in the global batch: features [N, D] float32, labels [N], at ``step``."""
        if self.keeps_moments:
            self._merge(features, labels)
        size = len(self.ring)
        if size == 0:
            return
        rows = min(size, len(features))
        newest = torch.arange(len(features) - rows, len(features), device=self.ring.device)
        place = (self.written + newest) % size
        self.ring[place] = features[-rows:]
        self.ring_labels[place] = labels[-rows:]
        self.ring_steps[place] = step
        self.written += len(features)

    def recent(self) -> tuple[Tensor, Tensor]:
        """The features [R', D] and labels [R'] in the ring; R' grows to R."""
        filled = min(int(self.written), len(self.ring))
        return self.ring[:filled], self.ring_labels[:filled]

    def age(self, step: int) -> Tensor:
        """[] mean number of steps since the features in the ring were written; 0 if it is empty."""
        filled = self.ring_labels >= 0
        age = ((step - self.ring_steps) * filled).sum()
        return age / filled.sum().clamp(min=1)

    def _merge(self, features: Tensor, labels: Tensor) -> None:
        """Merge weight, mean and variance exactly (Chan, Golub and LeVeque 1983, equation 2.1).

        Of the classes of the batch alone: to others nothing happens but that they fade.
        """
        classes, place = labels.unique(return_inverse=True)
        self.weight *= self.decay
        before = self.weight[classes]
        # By matrix products: adding by index has another order at each call on a GPU, and ranks
        # must come to the same bits.
        members = (place == torch.arange(len(classes), device=place.device).unsqueeze(1)).float()
        count = members.sum(1)
        mean = members @ features / count.unsqueeze(1)
        squares = members @ (features - mean[place]).square()
        total = before + count
        part = (count / total).unsqueeze(1)
        delta = mean - self.mean[classes]
        squares += before.unsqueeze(1) * (self.variance[classes] + delta.square() * part)
        self.variance[classes] = squares / total.unsqueeze(1)
        self.mean[classes] += delta * part
        self.weight[classes] = total
