"""Transport between a batch of students and a minibatch of teacher samples, as others do it.

Three published rows that the global transport is compared with: the reference's own term,
JUMBOT and DeepJDOT. All of them see the teacher through the few samples of a step, so that the
plan matches what happens to be in the two batches (Fatras et al. 2021, section 3).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.sinkhorn import pairwise_distance

Metric = Literal["cosine", "l2", "l1", "chordal"]

_CHECK_EVERY = 10
_CONVERGED = 1e-9
"""Norm of the marginals' error at which POT stops, its default."""
_MOST_ITERATIONS = 1000
_MOVED = 1e-5
"""Change of potentials, in units of epsilon, that ends unbalanced iterations."""
_LARGEST_ASSIGNMENT = 4096
_SMALLEST = 1e-12


def reference_transport(
    projected: Tensor,
    live_features: Tensor,
    *,
    metric: Metric = "cosine",
    epsilon: float = 0.1,
    iterations: int = 100,
) -> Tensor:
    """Transported cost ``<P, M>`` [] of two minibatches, as the UCMKD release computes it.

    Tran et al., "Cross-Modal Knowledge Distillation without Paired Data" (arXiv 2606.10504),
    feature alignment. The release calls ``ot.sinkhorn2`` of POT with uniform masses: plain
    scaling iterations of ``exp(-M / epsilon)``, differentiated through, labels unused. Its faults
    are kept: epsilon is absolute, there is no self-term, and where the kernel underflows the
    iterations end at the scalings before, so that distances of tens of epsilons have a value and
    a gradient near 0. Computed in float64 if a batch is float64, else in float32. Autograd keeps
    B x M numbers an iteration.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        live_features: [M, D] teacher features, constants.
        metric: "cosine" is 1 - cos, "l2" and "l1" are distances, "chordal" is l2 of unit vectors.
        epsilon: entropic regularisation, in units of the cost.
        iterations: most iterations.

    Raises:
        UsageError: a batch is empty, the metric is unknown, or epsilon is not positive.
    """
    _check(projected, live_features, epsilon)
    dtype = torch.promote_types(projected.dtype, live_features.dtype)
    dtype = dtype if dtype == torch.float64 else torch.float32
    cost = _reference_cost(projected.to(dtype), live_features.detach().to(dtype), metric)
    plan = _scaling_plan(cost, epsilon, iterations)
    return (plan * cost).sum()


def jumbot(
    projected: Tensor,
    live_features: Tensor,
    logits: Tensor,
    live_labels: Tensor,
    *,
    cost_weight: float = 0.1,
    label_weight: float = 0.1,
    epsilon: float = 0.1,
    relaxation: float = 0.5,
) -> Tensor:
    """Joint unbalanced minibatch transport ``<P, c>`` [] of features and labels.

    JUMBOT: Fatras et al., "Unbalanced minibatch Optimal Transport; applications to Domain
    Adaptation" (arXiv 2103.03606), section 5. The cost of sample i and teacher sample j is
    ``cost_weight ||z_i - t_j||^2 / m + label_weight CE(y_j, student's prediction for i)``, and P
    minimises ``<P, c> + epsilon KL(P | a x b) + relaxation (KL(P 1 | a) + KL(P^T 1 | b))`` with
    uniform a and b. P is a constant: its gradient is the envelope's.

    Departures: m, the mean squared distance of the two batches (a constant), makes epsilon a
    share of the typical cost whatever the width and the scale of features; and P is regularised
    by ``KL(P | a x b)``, as the paper writes it, where the released code, on an older POT, takes
    the plan's entropy. The teacher's features are constants; the paper trains them, too.
    ``cost_weight``, ``label_weight`` and ``epsilon`` are the release's for digits (its tau there
    is 1). ``transport_solver.sinkhorn`` relaxes only columns and cannot stand in.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        live_features: [M, D] teacher features, constants.
        logits: [B, C] the student's, with gradient.
        live_labels: [M] int64 classes of the teacher samples.
        cost_weight: of the scaled squared distance (eta_1).
        label_weight: of the cross-entropy, in nats (eta_2).
        epsilon: entropic regularisation, in units of the cost.
        relaxation: weight of both marginals, in units of the cost (tau).

    Raises:
        UsageError: a batch is empty, or epsilon or relaxation is not positive and finite.
    """
    _check(projected, live_features, epsilon, relaxation)
    square = pairwise_distance(projected, live_features.detach()).square()
    unit = square.detach().mean().clamp(min=_SMALLEST)
    cost = cost_weight * square / unit + label_weight * _label_cost(logits, live_labels)
    return (_unbalanced_plan(cost, epsilon, relaxation) * cost).sum()


def deepjdot(
    projected: Tensor,
    live_features: Tensor,
    logits: Tensor,
    live_labels: Tensor,
    *,
    feature_weight: float = 1e-3,
    label_weight: float = 1e-4,
) -> Tensor:
    """Joint transport ``<P, c>`` [] of features and labels by the exact plan of two minibatches.

    Damodaran et al., "DeepJDOT: Deep Joint Distribution Optimal Transport for Unsupervised
    Domain Adaptation" (arXiv 1803.10081), equations 5 and 6: the cost of sample i and teacher
    sample j is ``feature_weight ||z_i - t_j||^2 + label_weight CE(y_j, prediction for i)``; P is
    least for the cost as it is and then constant, so that the gradient is through the cost
    alone. The weights are those of the released code for digits (alpha and lambda_t), chosen
    for squared distances that are not normalised; P depends on their ratio only. Departures: the
    teacher's features are constants, and the paper's cross-entropy on source samples, which keeps
    a network that both sides share from forgetting them, has no part here.

    With uniform masses an exact plan is an assignment; batches of unequal sizes are repeated to
    their common multiple, which leaves the masses as they are.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        live_features: [M, D] teacher features, constants.
        logits: [B, C] the student's, with gradient.
        live_labels: [M] int64 classes of the teacher samples.
        feature_weight: of the squared distance.
        label_weight: of the cross-entropy, in nats.

    Raises:
        UsageError: a batch is empty, or the sizes' common multiple exceeds 4,096.
    """
    _check(projected, live_features)
    square = pairwise_distance(projected, live_features.detach()).square()
    cost = feature_weight * square + label_weight * _label_cost(logits, live_labels)
    return (_exact_plan(cost) * cost).sum()


def _check(projected: Tensor, live_features: Tensor, *positive: float) -> None:
    if not (len(projected) and len(live_features)):
        raise UsageError(
            f"Transport needs samples on both sides, and got {len(projected)} of the student and "
            f"{len(live_features)} of the teacher: leave the step out, or draw larger batches."
        )
    if not all(0 < value < math.inf for value in positive):
        raise UsageError(
            "Transport needs a positive, finite epsilon and relaxation, and got "
            f"{', '.join(map(str, positive))}: take for example 0.1 and 0.5."
        )


def _reference_cost(x: Tensor, y: Tensor, metric: Metric) -> Tensor:
    """[B, M] cost of each pair."""
    if metric == "l2":
        return torch.cdist(x, y, p=2.0)
    if metric == "l1":
        return torch.cdist(x, y, p=1.0)
    x, y = functional.normalize(x, dim=1), functional.normalize(y, dim=1)
    if metric == "chordal":
        return torch.cdist(x, y, p=2.0)
    if metric == "cosine":
        return 1.0 - x @ y.T
    raise UsageError(f"There is no metric {metric!r}: choose cosine, l2, l1 or chordal.")


def _scaling_plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """[B, M] plan with its gradient, by POT's updates and rules for stopping."""
    rows, columns = cost.shape
    kernel = torch.exp(cost / -epsilon)
    u, v = cost.new_full((rows,), 1.0 / rows), cost.new_full((columns,), 1.0 / columns)
    for iteration in range(iterations):
        column_sum = kernel.T @ u
        new_v = 1.0 / columns / column_sum
        new_u = 1.0 / rows / (kernel @ new_v)
        valid = (column_sum != 0).all() & new_u.isfinite().all() & new_v.isfinite().all()
        if not bool(valid):
            break
        u, v = new_u, new_v
        if iteration % _CHECK_EVERY == 0:
            error = (v * (kernel.T @ u) - 1.0 / columns).detach()
            if float(torch.linalg.vector_norm(error)) < _CONVERGED:
                break
    return u.unsqueeze(1) * kernel * v


def _label_cost(logits: Tensor, live_labels: Tensor) -> Tensor:
    """[B, M] cross-entropy of each student prediction against each teacher sample's label."""
    return -functional.log_softmax(logits.float(), dim=1)[:, live_labels]


@torch.no_grad()
def _unbalanced_plan(cost: Tensor, epsilon: float, relaxation: float) -> Tensor:
    """[B, M] plan with both marginals relaxed: Chizat et al. (2018), section 4, in logarithms."""
    rows, columns = cost.shape
    power = relaxation / (relaxation + epsilon)
    # The masses are in the kernel; potentials are in units of epsilon.
    kernel = cost / -epsilon - math.log(rows * columns)
    second = cost.new_zeros(columns)
    for iteration in range(1, _MOST_ITERATIONS + 1):
        first = -power * (torch.logsumexp(kernel + second, dim=1) + math.log(rows))
        before = second
        second = -power * (torch.logsumexp(kernel + first.unsqueeze(1), dim=0) + math.log(columns))
        if iteration % _CHECK_EVERY == 0 and float((second - before).abs().max()) <= _MOVED:
            break
    return torch.exp(kernel + first.unsqueeze(1) + second)


@torch.no_grad()
def _exact_plan(cost: Tensor) -> Tensor:
    """[B, M] plan of least cost between uniform masses."""
    # Only this row needs it, and its import takes as long as all of the rest.
    from scipy.optimize import linear_sum_assignment

    rows, columns = cost.shape
    size = math.lcm(rows, columns)
    if size > _LARGEST_ASSIGNMENT:
        raise UsageError(
            f"Exact transport between batches of {rows} and {columns} is an assignment of {size} "
            f"points, more than {_LARGEST_ASSIGNMENT}: make the batches equal, or one size a "
            "multiple of the other."
        )
    # A cost that has diverged is for the training loop to find in the loss, not for scipy.
    values = np.nan_to_num(cost.double().cpu().numpy())
    repeated = values.repeat(size // rows, axis=0).repeat(size // columns, axis=1)
    row, column = linear_sum_assignment(repeated)
    plan = np.zeros((rows, columns))
    np.add.at(plan, (row // (size // rows), column // (size // columns)), 1.0 / size)
    return torch.from_numpy(plan).to(cost)
