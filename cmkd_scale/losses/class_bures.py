"""Distance of the student's class-conditional Gaussians to the teacher's, and its gradient.

For Gaussians the squared 2-Wasserstein distance is closed (Dowson and Landau 1982); with
diagonal covariances it is ``||m - m'||^2 + ||s - s'||^2``. For other distributions it is a lower
bound of W2^2 (Gelbrich 1990).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale.losses.global_transport import with_gradient

_SMALLEST = 1e-8


def class_bures(
    features: Tensor,
    labels: Tensor,
    *,
    student_mean: Tensor,
    student_variance: Tensor,
    teacher_mean: Tensor,
    teacher_variance: Tensor,
    scale: float,
) -> Tensor:
    """[B] squared Gaussian distance of each sample's class, with gradient to its features.

    The student's moments are pooled over ranks and steps and are constants here. A sample moves
    them by its share, so its gradient is ``2 (z - T_c(z)) / scale^2``, where
    ``T_c(z) = m' + s'/s (z - m)`` is the optimal map between the Gaussians: a sum over samples,
    the same however a batch is split over ranks.

    Args:
        features: [B, D]
        labels: [B] int64
        student_mean: [C, D]
        student_variance: [C, D]
        teacher_mean: [C, D]
        teacher_variance: [C, D]
        scale: unit of length.
    """
    with torch.no_grad():
        mean, other = student_mean[labels], teacher_mean[labels]
        deviation = student_variance[labels].clamp(min=_SMALLEST).sqrt()
        wanted = teacher_variance[labels].clamp(min=0.0).sqrt()
        value = ((mean - other).square() + (deviation - wanted).square()).sum(1) / scale**2
        moved = other + wanted / deviation * (features.float() - mean)
        gradient = 2.0 * (features.float() - moved) / scale**2
    return with_gradient(features, value, gradient)
