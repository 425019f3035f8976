"""Distribution alignment without pairs or labels: CORAL and MMD against what a memory holds.

Both compare the batch as a whole with the teacher as a whole, and so may match one class with
another; they are baselines for the class-conditional rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale.losses.sinkhorn import pairwise_distance

_BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
_SMALLEST = 1e-12


def coral(projected: Tensor, teacher_mean: Tensor, teacher_covariance: Tensor) -> Tensor:
    """``||C_S - C_T||_F^2 / (4 D^2) + ||m_S - m_T||^2 / D`` [].

    Sun and Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation" (arXiv
    1607.01719), equation 1, with the batch's covariance divided by B - 1 as in its equation 2.
    Departures: the squared distance of means, which the memory has and CORAL leaves to batch
    normalisation; the teacher's covariance is that of the memory (``pooled_moments``), not of a
    batch. A batch of one has a covariance of 0, and only its mean is pulled.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        teacher_mean: [D]
        teacher_covariance: [D, D]
    """
    x = projected.float()
    batch, dim = x.shape
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / max(1, batch - 1)
    spread = (covariance - teacher_covariance.float()).square().sum() / (4.0 * dim**2)
    return spread + (mean - teacher_mean.float()).square().sum() / dim


@torch.no_grad()
def pooled_moments(
    class_mean: Tensor, class_variance: Tensor, class_factor: Tensor, class_share: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of all classes together, from those of each.

    The law of total covariance: the mean of the classes' covariances plus the covariance of
    their means. A class's covariance is ``F^T F`` with its diagonal replaced by the variance
    (``memory.covariance``), so the diagonal here is exact and the rest as good as the factors'
    rank. Computed in float64, returned in float32: it is done once a run.

    Args:
        class_mean: [C, D]
        class_variance: [C, D] population variance of each feature.
        class_factor: [C, R, D] leading directions F of each covariance.
        class_share: [C] weight of each class, of total 1; 0 for one that the memory lacks, whose
            moments are not read.
    """
    known = class_share > 0
    share = class_share[known].double()
    means = class_mean[known].double()
    mean = share @ means
    between = (means - mean) * share.sqrt().unsqueeze(1)
    factors = class_factor[known].double() * share.sqrt()[:, None, None]
    rows = factors.flatten(0, 1)
    within = rows.T @ rows
    within.diagonal().copy_(share @ class_variance[known].double())
    return mean.float(), (within + between.T @ between).float()


def mmd(projected: Tensor, prototypes: Tensor, target_mass: Tensor) -> Tensor:
    """Squared maximum mean discrepancy [] of a batch to the weighted prototypes.

    Gretton et al., "A Kernel Two-Sample Test" (2012), equation 5 (the biased V-statistic, 0 or
    more but for rounding), with the kernel of Long et al., "Learning Transferable Features with
    Deep Adaptation Networks" (arXiv 1502.02791), unweighted: ``k(x, y) = sum_b exp(-||x - y||^2
    / (b median^2))`` for b of 1, 2, 4, 8 and 16, where the median is of the distances between
    all points of the joint sample, the lower of the two middle ones, and a constant. Departure:
    the teacher's sample is its prototypes, each with its mass; what lies within a cell counts as
    lying at its centre.

    Takes ``(B + J)^2`` numbers for each of the five kernels: made for some thousand prototypes.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        prototypes: [J, D] constants.
        target_mass: [J] mass of each, of total 1; those without mass are left out.
    """
    present = target_mass > 0
    x, y = projected.float(), prototypes[present].detach().float()
    points = torch.cat([x, y])
    weights = torch.cat([x.new_full((len(x),), 1.0 / len(x)), -target_mass[present].float()])
    square = pairwise_distance(points, points).square()
    unit = _off_diagonal(square.detach()).median().clamp(min=_SMALLEST)
    kernel = torch.stack([torch.exp(square / (-b * unit)) for b in _BANDWIDTHS]).sum(0)
    return (weights.unsqueeze(1) * weights * kernel).sum()


def _off_diagonal(square: Tensor) -> Tensor:
    """[n (n - 1)] entries of a matrix [n, n] but its diagonal."""
    size = len(square)
    # Of rows of n + 1 entries, each begins with one of the diagonal.
    return square.flatten()[:-1].view(size - 1, size + 1)[:, 1:].flatten()
