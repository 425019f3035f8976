"""Leading directions of a class's covariance, so that it is diagonal plus low rank.

Covariance of class c is taken as ``F^T F + diag(variance - sum of F^2 over rows)``: right on
the diagonal, and as near to the whole as a factor of R rows can be (Eckart and Young 1936),
but for features whose variance is less than the factor says (``within_variance``).
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factor(features: Tensor, rank: int) -> Tensor:
    """Principal directions, each as long as the standard deviation along it.

    Computed in float64 from the smaller of the two Gram matrices, since n and D may both be
    thousands.

    Args:
        features: [n, D] samples of one class.
        rank: rows R of the factor.

    Returns:
        F [R, D] float32, largest first, the largest component of each row positive; rows
        beyond the dimensions that the samples span are zero.
    """
    count, dim = features.shape
    factor = torch.zeros(rank, dim)
    if count < 2 or rank == 0:
        return factor
    centred = features.double() - features.double().mean(0)
    if count <= dim:
        values, vectors = torch.linalg.eigh(centred @ centred.T / count)
        rows = (vectors.T @ centred) / count**0.5
    else:
        values, vectors = torch.linalg.eigh(centred.T @ centred / count)
        rows = vectors.T * values.clamp(min=0.0).sqrt().unsqueeze(1)
    # Ascending; what is below rounding has no direction.
    real = values > 1e-12 * values[-1]
    found = rows[real].flip(0)[:rank]
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    factor[: len(found)] = (found * largest.sign()).float()
    return factor


def within_variance(factor: Tensor, variance: Tensor) -> Tensor:
    """Shorten a factor where it says more than the variance, feature by feature.

    Directions are those of the samples that were kept and variances those of all samples, so a
    feature may vary more among the former. With S diagonal, ``S F^T F S`` stays positive
    semi-definite, and what is left on the diagonal is not negative.

    Args:
        factor: F [..., R, D].
        variance: [..., D] float32.

    Returns:
        F S; the same bits where nothing was too long.
    """
    found = factor.square().sum(-2, dtype=torch.float64)
    # A little less than the variance, so that rounding to float32 leaves no negative rest.
    allowed = variance.double() * (1.0 - 2.0**-21)
    scale = torch.where(found > allowed, (allowed / found.clamp(min=1e-300)).sqrt(), 1.0)
    return factor * scale.float().unsqueeze(-2)
