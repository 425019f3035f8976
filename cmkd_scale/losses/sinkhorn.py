"""Transport solvers: the semi-dual's conditional plan, in the log domain.

No unrolling anywhere: by the envelope theorem the gradient of a transport cost with respect
to the features is the plan times the gradient of the ground cost, with the plan held fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
    scores = (potentials.float() - cost.float()) / epsilon + log_mass.float()
    # A row without any prototype would be NaN; it sends nothing.
    empty = torch.isneginf(scores).all(dim=1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=1).masked_fill(empty, 0.0)


def annealed_epsilon(step: int, steps: int, start: float, end: float) -> float:
    """Geometric path from ``start`` at step 0 to ``end`` half-way through, then constant."""
    progress = min(1.0, 2.0 * step / max(1, steps))
    return math.exp((1.0 - progress) * math.log(start) + progress * math.log(end))
