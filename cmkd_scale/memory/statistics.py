"""Mergeable count, mean and variance of each class, exact whatever the order of merging.

Floating-point sums depend on the order of addition, so two ranks would disagree with
three. Here features are rounded once to multiples of 2^-24 and summed as 64-bit integers:
addition is exact and associative, and the result is the same bits for every world size and
order. The rounding (6e-8 for features of unit scale) is below float32's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale.errors import IntegrityError

_UNIT = float(2**24)
_LARGEST = float(2**12)


class Moments:
    """Sums of values and squares of each class; shapes [C], [C, D], [C, D]."""

    def __init__(self, classes: int, dim: int) -> None:
        """Start empty, for ``classes`` classes and features of width ``dim``."""
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.total = torch.zeros(classes, dim, dtype=torch.int64)
        self.squares = torch.zeros(classes, dim, dtype=torch.int64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features [n, D] of classes ``labels`` [n].

        Raises:
            IntegrityError: a feature is not finite, or is 4096 or larger in magnitude.
        """
        refuse_diverged(features)
        values = features.detach().double().cpu()
        self.add_rows(
            labels.cpu(),
            torch.ones_like(labels, device="cpu"),
            (values * _UNIT).round().long(),
            (values.square() * _UNIT).round().long(),
        )

    def add_rows(self, labels: Tensor, count: Tensor, total: Tensor, squares: Tensor) -> None:
        """Add the sums [m], [m, D], [m, D] of the classes ``labels`` [m], which may repeat."""
        self.count.index_add_(0, labels, count)
        self.total.index_add_(0, labels, total)
        self.squares.index_add_(0, labels, squares)

    def tensors(self) -> tuple[Tensor, ...]:
        """The integer sums; adding them element-wise merges two sets of samples."""
        return self.count, self.total, self.squares

    def mean(self) -> Tensor:
        """[C, D] float64 mean; zero for an empty class."""
        return self.total.double() / _UNIT / self._divisor()

    def variance(self) -> Tensor:
        """[C, D] float64 population variance; zero for an empty class."""
        second = self.squares.double() / _UNIT / self._divisor()
        return (second - self.mean().square()).clamp(min=0.0)

    def _divisor(self) -> Tensor:
        return self.count.clamp(min=1).double().unsqueeze(1)


def refuse_diverged(features: Tensor) -> None:
    """Refuse features that have no exact sum.

    Raises:
        IntegrityError: one is not finite, or is 4096 or larger in magnitude.
    """
    # A comparison with NaN is false, so this refuses NaN too.
    if not bool((features.detach().abs() < _LARGEST).all()):
        raise IntegrityError(
            "The teacher returned features that are not finite or exceed 4096 in magnitude; "
            "its training has diverged. Train it again with a smaller train.learning_rate."
        )
