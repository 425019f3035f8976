"""Plans of a batch against prototypes, and the transported cost with its envelope gradient.

The prototypes of a class lie side by side (``[C, K, ...]``), so that what a sample needs is one
block of memory. Nothing of size [B, K] is recorded for differentiation: by the envelope theorem
(Genevay et al. 2016) the gradient of the transported cost is the plan times the gradient of the
ground cost, and is known as soon as the plan is.

Ground costs, in units of the cost scale s: ``||x - t|| / s``, or its square.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmkd_scale.losses.sinkhorn import pairwise_distance, semi_dual_plan
from cmkd_scale.losses.transport_solver import sinkhorn

_CACHED_BYTES = 4 << 20
_CLOSEST = 1e-4
"""Smallest distance told from 0, in units of the scale: float32 resolves no smaller one."""


class Assignment(NamedTuple):
    """Where the mass of a batch goes."""

    cost: Tensor
    """[B] transported cost of each sample, with the envelope gradient to its features."""
    plan: Tensor
    """[B, K] share of the sample that each of its candidates receives, without gradient."""
    ascent: Tensor
    """[B, K] the same under the potentials that ascend, where the plan is made with others."""


class _Envelope(torch.autograd.Function):
    """A value whose gradient is known: [B] values, [B, D] gradients."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0].unsqueeze(1) * gradient, None, None


def with_gradient(features: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` [B], with ``gradient`` [B, D] as its derivative by ``features`` [B, D]."""
    out: Tensor = _Envelope.apply(features, value, gradient)  # type: ignore[no-untyped-call]
    return out


def class_masked(
    features: Tensor,
    labels: Tensor,
    *,
    blocks: Tensor,
    square_norms: Tensor,
    log_mass: Tensor,
    potentials: Tensor,
    ascending: Tensor | None = None,
    scale: float,
    epsilon: float,
    squared: bool = False,
) -> Assignment:
    """Transport each sample to the prototypes of its own class alone.

    Args:
        features: [B, D] of the samples, relative to the same origin as the blocks of their
            class (its mean, so that products of small numbers are compared).
        labels: [B] int64 block of each sample.
        blocks: [C, K, D] prototypes of each class.
        square_norms: [C, K] their squared lengths.
        log_mass: [B, K] log of the target masses, -inf where there is no prototype.
        potentials: [B, K] dual potentials, in units of the cost.
        ascending: [B, K] the potentials that ascend, if the plan is made with an average of them.
        scale: s.
        epsilon: entropic regularisation, in units of the cost.
        squared: whether the cost is the squared distance.
    """
    with torch.no_grad():
        x = features.float()
        parts = []
        for rows in torch.arange(len(x)).split(_rows_in_cache(blocks)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            y, z = labels[part], x[part]
            square = block_products(blocks, y, z).mul_(-2.0).add_(square_norms[y])
            cost = _ground_cost(square.add_(z.square().sum(1, keepdim=True)), scale, squared)
            rising = None if ascending is None else ascending[part]
            plan, ascent = _plans(cost, log_mass[part], potentials[part], rising, epsilon)
            pull = _pull(plan, cost, scale, squared)
            gradient = z * pull.sum(1, keepdim=True) - block_sums(pull, blocks, y)
            parts.append((cost.mul_(plan).sum(1), gradient, plan, ascent))
        value, gradient, plan, ascent = (torch.cat(part) for part in zip(*parts, strict=True))
    return Assignment(with_gradient(features, value, gradient), plan, ascent)


def against_all(
    features: Tensor,
    *,
    prototypes: Tensor,
    square_norms: Tensor,
    log_mass: Tensor,
    potentials: Tensor,
    ascending: Tensor | None = None,
    scale: float,
    epsilon: float,
    squared: bool = False,
    label_cost: Tensor | None = None,
) -> Assignment:
    """Transport each sample to any prototype; the classes meet in ``label_cost`` if at all.

    Args:
        features: [B, D]
        prototypes: [J, D]
        square_norms: [J] their squared lengths.
        log_mass: [J] log of the target masses.
        potentials: [J]
        ascending: [J] as in ``class_masked``.
        scale: s.
        epsilon: entropic regularisation, in units of the cost.
        squared: whether the cost is the squared distance.
        label_cost: [B, J] added to the ground cost, in its units; without gradient.
    """
    with torch.no_grad():
        x = features.float()
        square = torch.addmm(square_norms.unsqueeze(0), x, prototypes.T, alpha=-2.0)
        cost = _ground_cost(square.add_(x.square().sum(1, keepdim=True)), scale, squared)
        priced = cost if label_cost is None else cost + label_cost
        plan, ascent = _plans(priced, log_mass, potentials, ascending, epsilon)
        pull = _pull(plan, cost, scale, squared)
        gradient = x * pull.sum(1, keepdim=True) - pull @ prototypes
        value = (plan * priced).sum(1)
    return Assignment(with_gradient(features, value, gradient), plan, ascent)


def against_candidates(
    features: Tensor,
    *,
    candidates: Tensor,
    log_mass: Tensor,
    potentials: Tensor,
    ascending: Tensor | None = None,
    scale: float,
    epsilon: float,
    squared: bool = False,
) -> Assignment:
    """Transport each sample to the prototypes that a search has found for it.

    Args:
        features: [B, D]
        candidates: [B, K, D] prototypes.
        log_mass: [B, K] log of the target masses, -inf where the search found nothing.
        potentials: [B, K]
        ascending: [B, K] as in ``class_masked``.
        scale: s.
        epsilon: entropic regularisation, in units of the cost.
        squared: whether the cost is the squared distance.
    """
    with torch.no_grad():
        apart = features.float().unsqueeze(1) - candidates
        cost = _ground_cost(apart.square().sum(2), scale, squared)
        plan, ascent = _plans(cost, log_mass, potentials, ascending, epsilon)
        pull = _pull(plan, cost, scale, squared)
        gradient = torch.bmm(pull.unsqueeze(1), apart).squeeze(1)
        value = (plan * cost).sum(1)
    return Assignment(with_gradient(features, value, gradient), plan, ascent)


def against_own(
    features: Tensor,
    labels: Tensor,
    *,
    recent: Tensor,
    recent_labels: Tensor,
    scale: float,
    epsilon: float,
    squared: bool = False,
) -> Tensor:
    """[B] half the cost of transporting the student to itself: what debiasing subtracts.

    Sinkhorn divergences (Feydy et al. 2019, equation 3) subtract half the self-term. Here the
    second copy of the student's distribution is its recent features of the same class. Both
    copies move with the student, so that the gradient is that of the whole cost.

    Args:
        features: [B, D]
        labels: [B] int64
        recent: [R, D] recent features, constants.
        recent_labels: [R] int64
        scale: s.
        epsilon: entropic regularisation, in units of the cost.
        squared: whether the cost is the squared distance.
    """
    with torch.no_grad():
        x = features.float()
        same = labels.unsqueeze(1) == recent_labels.unsqueeze(0)
        # A class without recent features is left out; the others' masses fit on both sides.
        found = same.any(1)
        row_mass = found.float() / found.sum().clamp(min=1)
        partners = same.sum(1).clamp(min=1)
        column_mass = (same * (row_mass / partners).unsqueeze(1)).sum(0)
        cost = _ground_cost(pairwise_distance(x, recent).square_(), scale, squared)
        masked = cost.masked_fill(~same, torch.inf)
        plan = sinkhorn(masked, row_mass, column_mass, epsilon=epsilon, iterations=20).plan
        plan = plan / row_mass.clamp(min=1e-12).unsqueeze(1)
        pull = _pull(plan, cost, scale, squared)
        gradient = x * pull.sum(1, keepdim=True) - pull @ recent
        value = 0.5 * (plan * cost).sum(1)
    return with_gradient(features, value, gradient)


def block_products(blocks: Tensor, labels: Tensor, x: Tensor) -> Tensor:
    """[B, K] inner products of x [B, D] with the rows of each sample's block [C, K, D]."""
    if blocks.is_cuda:
        return torch.bmm(blocks[labels], x.unsqueeze(2)).squeeze(2)
    out = x.new_empty(len(x), blocks.shape[1])
    _each(labels, blocks, x, out, transposed=False)
    return out


def block_sums(weights: Tensor, blocks: Tensor, labels: Tensor) -> Tensor:
    """[B, E] rows of each sample's block [C, K, E], weighted by weights [B, K] and added."""
    if blocks.is_cuda:
        return torch.bmm(weights.unsqueeze(1), blocks[labels]).squeeze(1)
    out = weights.new_empty(len(weights), blocks.shape[2])
    _each(labels, blocks, weights, out, transposed=True)
    return out


def _each(
    labels: Tensor, blocks: Tensor, vectors: Tensor, out: Tensor, *, transposed: bool
) -> None:
    """Multiply each sample's block with its vector, reading the block where it lies.

    On a CPU copying blocks together costs more than the products, and NumPy's calls cost less
    than torch's: on blocks of 1,000 x 128 its BLAS takes half the time.
    """
    tables, rows, results = blocks.numpy(), vectors.numpy(), out.numpy()
    for row, label in enumerate(labels.tolist()):
        block = tables[label]
        np.dot(block.T if transposed else block, rows[row], out=results[row])


def _rows_in_cache(blocks: Tensor) -> int:
    """How many samples' blocks a CPU's cache holds from one product with them to the next."""
    if blocks.is_cuda:
        return 1 << 30
    bytes_a_block = blocks.shape[1] * blocks.shape[2] * blocks.element_size()
    return max(1, _CACHED_BYTES // bytes_a_block)


def _ground_cost(square: Tensor, scale: float, squared: bool) -> Tensor:
    """Cost of squared distances, which are overwritten."""
    if squared:
        return square.clamp_(min=0.0).div_(scale**2)
    # Closer than rounding can tell, a sample stands at the prototype: its cost has no slope there.
    return square.clamp_(min=(_CLOSEST * scale) ** 2).sqrt_().div_(scale)


def _plans(
    cost: Tensor, log_mass: Tensor, potentials: Tensor, ascending: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The plan, and the one under the potentials that ascend."""
    plan = semi_dual_plan(cost, log_mass, potentials, epsilon)
    if ascending is None:
        return plan, plan
    return plan, semi_dual_plan(cost, log_mass, ascending, epsilon)


def _pull(plan: Tensor, cost: Tensor, scale: float, squared: bool) -> Tensor:
    """Weight of (x - t) in the gradient: plan times the cost's derivative by the distance, over
    the distance."""
    if squared:
        return plan * (2.0 / scale**2)
    return (plan / cost).div_(scale**2)
