"""Mergeable count, mean and variance of each class, exact whatever the order of merging.

Floating-point sums depend on the order of addition, so two ranks would disagree with
three. Here features are rounded once to multiples of 2^-24 and summed as 64-bit integers:
addition is exact and associative, and the result is the same bits for every world size and
order. A mean is right to 3e-8, which is float32's own precision for features of unit scale.
Squares are rounded to multiples of 2^-24, too, so a variance is right to 3e-8 plus 6e-8 times
the mean at worst: features that vary by less than about 2^-12 (2e-4) have no variance to speak
of here, and should be scaled up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cmkd_scale.errors import IntegrityError

_UNIT = float(2**24)
_LARGEST = float(2**12)
_LARGEST_SQUARE = int(_LARGEST**2 * _UNIT)  # of one sample, in units
_MOST = 2**63

Quantity = Literal["features", "losses"]
_REFUSED: dict[Quantity, str] = {
    "features": (
        "The teacher returned features that are not finite or exceed 4096 in magnitude: its "
        "training has diverged, or it is a pretrained network with features of that size. Train "
        "it again with a smaller train.learning_rate; normalise a pretrained network's features "
        "or project them to smaller ones."
    ),
    "losses": (
        "The teacher's cross-entropy on held-out samples is not finite or exceeds 4096 nats: its "
        "training has diverged. Train it again with a smaller train.learning_rate."
    ),
}


class Moments:
    """Sums of values and squares of each class; shapes [C], [C, D], [C, D]."""

    def __init__(
        self, classes: int, dim: int, *, of: Quantity = "features", parts: int = 1
    ) -> None:
        """Start empty.

        Args:
            classes: number of classes C.
            dim: width D of what is summed.
            of: what is summed, for the error's words.
            parts: how many such sums are added element-wise in the end, one a rank. Each may hold
                that part of what 64 bits can, so their sum cannot overflow.
        """
        self.of: Quantity = of
        self._most = _MOST // parts
        self.count = torch.zeros(classes, dtype=torch.int64)
        self.total = torch.zeros(classes, dim, dtype=torch.int64)
        self.squares = torch.zeros(classes, dim, dtype=torch.int64)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features [n, D] of classes ``labels`` [n].

        Raises:
            IntegrityError: a feature is not finite, or is 4096 or larger in magnitude, or a sum of
                squares would reach 2^39.
        """
        refuse_diverged(features, self.of)
        values = features.detach().double().cpu()
        self.add_rows(
            labels.cpu(),
            torch.ones_like(labels, device="cpu"),
            (values * _UNIT).round().long(),
            (values.square() * _UNIT).round().long(),
        )

    def add_rows(self, labels: Tensor, count: Tensor, total: Tensor, squares: Tensor) -> None:
        """Add the sums [m], [m, D], [m, D] of the classes ``labels`` [m], which may repeat.

        Raises:
            IntegrityError: a sum of squares would reach 2^39.
        """
        self.count.index_add_(0, labels, count)
        self._refuse_overflow(labels, squares)
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

    def _refuse_overflow(self, labels: Tensor, squares: Tensor) -> None:
        """Refuse squares that 64 bits cannot hold: integers would wrap without a word.

        That takes 2^15 samples of the largest features, and then float64 tells. Sums of values
        stay smaller, as no class has 2^39 samples.
        """
        crowded = self.count[labels] >= self._most // _LARGEST_SQUARE
        if not bool(crowded.any()):
            return
        classes, place = labels[crowded].unique(return_inverse=True)
        sums = self.squares[classes].double().index_add_(0, place, squares[crowded].double())
        # Their rounding, 1e-16 times the number of addends, is far below the margin.
        if bool((sums >= self._most * (1.0 - 2.0**-20)).any()):
            raise IntegrityError(
                f"A class has so many samples with so large {self.of} that the exact sum of their "
                "squares exceeds 64 bits (it must stay below 2^39, 5e11). Normalise the teacher's "
                "features or project them to smaller ones."
            )

    def _divisor(self) -> Tensor:
        return self.count.clamp(min=1).double().unsqueeze(1)


def refuse_diverged(values: Tensor, of: Quantity = "features") -> None:
    """Refuse values that have no exact sum.

    Raises:
        IntegrityError: one is not finite, or is 4096 or larger in magnitude.
    """
    # A comparison with NaN is false, so this refuses NaN too.
    if not bool((values.detach().abs() < _LARGEST).all()):
        raise IntegrityError(_REFUSED[of])
