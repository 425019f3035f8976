"""Relational distillation from a live teacher: how samples lie to one another, not where.

Park et al., "Relational Knowledge Distillation" (2019, arXiv 1904.05068). Distances and angles
are compared, so the widths of student and teacher may differ. Row i of the teacher's features
belongs to a sample of the same class as row i of the student's, not to the same sample: what
lies between samples of one class is noise, what lies between classes is what is taught. The
teacher's side is a constant.

Means are over all B^2 pairs and B^3 triplets, those with equal members included, as in the
released code: the paper's usual weights, 25 and 50, belong to these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_CLOSEST = 1e-4
"""Distance, in units of the mean, below which two samples have no direction between them: float32
would only show its rounding."""
_SMALLEST = 1e-12


def relative_distance(features: Tensor, live_features: Tensor) -> Tensor:
    """Huber loss of pairwise distances, each side's in units of its mean.

    Equations 5 to 7. The mean is that of equation 6, over all pairs of different samples; the
    released code leaves pairs at distance 0 out of it.

    Args:
        features: [B, D] of the student.
        live_features: [B, E] of the teacher.
    """
    return functional.smooth_l1_loss(
        _relative_distances(features.float()), _relative_distances(live_features.detach().float())
    )


def relative_angle(features: Tensor, live_features: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles that three samples make.

    Equations 8 and 9. Equal samples have no direction between them: their cosines are 0, with
    no gradient. Takes O(B^2 D + B^3) memory.

    Args:
        features: [B, D] of the student.
        live_features: [B, E] of the teacher.
    """
    return functional.smooth_l1_loss(
        _cosines(features.float()), _cosines(live_features.detach().float())
    )


def _relative_distances(x: Tensor) -> Tensor:
    """[B, B] distances in units of their mean."""
    # Differences, not products: those leave rounding where samples are equal.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distance / _mean_of_pairs(distance)


def _cosines(x: Tensor) -> Tensor:
    """[B, B, B] at (i, j, k): cosine of the angle at i between j and k."""
    apart = x.unsqueeze(0) - x.unsqueeze(1)
    distance = torch.linalg.vector_norm(apart, dim=2)
    closest = _CLOSEST * _mean_of_pairs(distance.detach())
    unit = apart / distance.masked_fill(distance <= closest, torch.inf).unsqueeze(2)
    return torch.bmm(unit, unit.transpose(1, 2))


def _mean_of_pairs(distance: Tensor) -> Tensor:
    """Mean of [B, B] over pairs of different samples, never 0."""
    count = len(distance)
    return (distance.sum() / max(1, count * (count - 1))).clamp(min=_SMALLEST)
