"""Feature alignment: cost of moving student features onto the teacher's prototypes."""

from __future__ import annotations

from torch import Tensor


def transport_cost(transported: Tensor, share: Tensor) -> Tensor:
    """Mean transported cost ``sum_j p_ij c_ij`` over the batch, in units of the cost scale.

    Args:
        transported: [B] cost of each sample, with the envelope gradient (``global_transport``).
        share: [B] weight of each sample; those of classes that the memory lacks add nothing.
    """
    return (transported * share).mean()


def gaussian_distance(bures: Tensor, share: Tensor) -> Tensor:
    """Mean squared Gaussian distance of the batch's classes (``class_bures``).

    Args:
        bures: [B] distance of each sample's class, with gradient.
        share: [B] weight of each sample.
    """
    return (bures * share).mean()
