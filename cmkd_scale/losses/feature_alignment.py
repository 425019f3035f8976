"""Feature alignment: cost of moving student features onto the teacher's prototypes."""

from __future__ import annotations

from torch import Tensor


def transport_cost(cost: Tensor, plan: Tensor, known: Tensor) -> Tensor:
    """Mean transported cost ``sum_j p_ij c_ij`` over the batch, in units of the cost scale.

    The plan is a constant: the gradient is the semi-dual's by the envelope theorem.

    Args:
        cost: [B, K] distance of each sample to each prototype of its class.
        plan: [B, K] share of the sample sent there, without gradient.
        known: [B] bool; samples of classes that the memory lacks add nothing.
    """
    per_sample = (plan * cost.float()).sum(1)
    return (per_sample * known).mean()
