"""Transport costs of features: the semi-dual's plan, distances, values with their gradients.

No unrolling anywhere: by the envelope theorem the gradient of a transport cost with respect
to the features is the plan times the gradient of the ground cost, with the plan held fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmkd_scale.losses.transport_solver import Transport, sinkhorn


@torch.no_grad()
def semi_dual_plan(cost: Tensor, log_mass: Tensor, potentials: Tensor, epsilon: float) -> Tensor:
    """Where each sample's mass goes, given the potentials: rows [B, K] that sum to 1.

    ``p_ij = softmax_j((v_j - c_ij) / epsilon + log b_j)``, Genevay et al., "Stochastic
    Optimization for Large-scale Optimal Transport" (2016), section 4. Computed in float32
    whatever the inputs' type, so that costs of hundreds of epsilons stay finite.

    Args:
        cost: [B, K] in units of the cost scale.
        log_mass: [B, K] log of the target masses, -inf where there is no prototype.
        potentials: [B, K] dual potentials of those prototypes.
        epsilon: entropic regularisation, in units of the cost scale.
    """
    scores = torch.sub(potentials.float(), cost.float()).div_(epsilon).add_(log_mass.float())
    # A row without any prototype would be NaN; it sends nothing. One column of it is enough.
    empty = torch.isneginf(scores.amax(dim=1, keepdim=True))
    scores[:, :1].masked_fill_(empty, 0.0)
    plan = torch.softmax(scores, dim=1)
    plan[:, :1].masked_fill_(empty, 0.0)
    return plan


def annealed_epsilon(step: int, steps: int, start: float, end: float) -> float:
    """Geometric path from ``start`` at step 0 to ``end`` half-way through, then constant."""
    progress = min(1.0, 2.0 * step / max(1, steps))
    return math.exp((1.0 - progress) * math.log(start) + progress * math.log(end))


def transport_loss(cost: Tensor, plan: Tensor) -> Tensor:
    """Transported cost ``<plan, cost>`` []; its gradient is that of the cost, weighted by the plan.

    For a plan that solves the problem of this cost, that is the gradient of the regularised
    transport value (envelope theorem). Differs from ``feature_alignment.transport_cost``, whose
    rows each sum to 1, in that the plan's mass is the weight of a sample.

    Args:
        cost: [B, N] with gradient; +inf where the plan sends nothing adds nothing.
        plan: [B, N] mass of each pair, taken as a constant.
    """
    finite = cost.float().clamp(max=torch.finfo(torch.float32).max)
    return (plan.detach().float() * finite).sum()


def pairwise_distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [B, N] of x [B, D] to y [N, D], in float32, by one matrix product.

    ``|x|^2 + |y|^2 - 2 x.y`` loses what is small beside the norms, so both are first shifted by
    the mean of y. A distance d then has a relative error of about ``3e-7 (|x|^2 + |y|^2) / d^2``,
    norms after the shift: 1e-5 or less between points that are as far apart as most, while
    equal points may be 1e-3 of their norm apart. ``cdist`` without the product is exact and about
    20 times slower. Gradient in x and y, by matrix products too; the derivative at 0 is 0.
    """
    x, y = x.float(), y.float()
    centre = y.detach().mean(0)
    return torch.cdist(x - centre, y - centre, compute_mode="use_mm_for_euclid_dist")


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    x_mass: Tensor,
    y_mass: Tensor,
    *,
    epsilon: float,
    scale: float,
    iterations: int = 100,
    tolerance: float = 1e-4,
    start_epsilon: float | None = None,
) -> Tensor:
    """Debiased transport ``OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2`` [], in units of the scale.

    Feydy et al., "Interpolating between Optimal Transport and MMD using Sinkhorn Divergences"
    (2019), equation 3, with the ground cost ``||x_i - y_j|| / scale``. Without the two
    self-terms, transport is least where x lies at barycentres of y; with them, where both
    measures are equal, and there it is 0. The gradient is with respect to x alone, by the
    envelope theorem: y is the teacher's.

    Args:
        x: [B, D] features, with gradient.
        y: [N, D] points, taken as constants.
        x_mass: [B] masses, of total 1.
        y_mass: [N] masses, of total 1.
        epsilon: entropic regularisation, in units of ``scale``.
        scale: unit of the distance.
        iterations: see ``sinkhorn``, as ``tolerance`` and ``start_epsilon``.
        tolerance: marginal error that ends the iterations.
        start_epsilon: start of epsilon scaling.

    Raises:
        UsageError: as ``sinkhorn``.
    """

    def solve(cost: Tensor, row_mass: Tensor, column_mass: Tensor) -> tuple[Tensor, Tensor]:
        solved = sinkhorn(
            cost.detach(),
            row_mass,
            column_mass,
            epsilon=epsilon,
            iterations=iterations,
            tolerance=tolerance,
            start_epsilon=start_epsilon,
        )
        return _dual_value(solved, row_mass, column_mass), transport_loss(cost, solved.plan)

    y = y.detach()
    value, moving = solve(pairwise_distance(x, y) / scale, x_mass, y_mass)
    value_x, moving_x = solve(pairwise_distance(x, x) / scale, x_mass, x_mass)
    value_y, _ = solve(pairwise_distance(y, y) / scale, y_mass, y_mass)
    slope = moving - moving_x / 2
    # The dual's value, with the gradient of the transported costs.
    return value - value_x / 2 - value_y / 2 + (slope - slope.detach())


def _dual_value(solved: Transport, row_mass: Tensor, column_mass: Tensor) -> Tensor:
    """``<plan, cost> + epsilon KL(plan | a x b)``, from the potentials of a balanced problem."""
    return (row_mass.float() * solved.first).sum() + (column_mass.float() * solved.second).sum()
