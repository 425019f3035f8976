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
        student_mean: [B, D] of each sample's class.
        student_variance: [B, D]
        teacher_mean: [B, D]
        teacher_variance: [B, D]
        scale: unit of length.
    """
    with torch.no_grad():
        deviation = student_variance.clamp(min=_SMALLEST).sqrt()
        wanted = teacher_variance.clamp(min=0.0).sqrt()
        value = ((student_mean - teacher_mean).square() + (deviation - wanted).square()).sum(
            1
        ) / scale**2
        moved = teacher_mean + wanted / deviation * (features.float() - student_mean)
        gradient = 2.0 * (features.float() - moved) / scale**2
    return with_gradient(features, value, gradient)
