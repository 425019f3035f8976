"""Cross-entropy with the labels, plain or smoothed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cmkd_scale.losses.precision import at_least_float

SMOOTHING = 0.1
"""Label smoothing of the reference, and so of the control for every method."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, C] against labels [B]."""
    return functional.cross_entropy(at_least_float(logits), labels)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against labels smoothed by 0.1 (Szegedy et al. 2016, section 7)."""
    return functional.cross_entropy(at_least_float(logits), labels, label_smoothing=SMOOTHING)
