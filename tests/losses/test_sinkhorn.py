from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses.sinkhorn import (
    annealed_epsilon,
    pairwise_distance,
    semi_dual_plan,
    sinkhorn_divergence,
    transport_loss,
)
from cmkd_scale.losses.transport_solver import sinkhorn


def reference_value(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """``<P, c> + epsilon KL(P | a x b)`` by log-domain Sinkhorn in the inputs' type, unrolled."""
    log_a, log_b = a.log(), b.log()
    g = torch.zeros_like(b)
    for _ in range(600):
        f = -epsilon * torch.logsumexp((g - cost) / epsilon + log_b, 1)
        g = -epsilon * torch.logsumexp((f[:, None] - cost) / epsilon + log_a[:, None], 0)
    log_density = (f[:, None] + g - cost) / epsilon
    plan = a[:, None] * b * log_density.exp()
    return (plan * (cost + epsilon * log_density)).sum()


def features(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two clouds [B, 5] and [N, 5] with uneven masses, all in float64."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, 5, generator=generator, dtype=torch.float64) + 0.5
    a = torch.softmax(torch.randn(rows, generator=generator, dtype=torch.float64), 0)
    b = torch.softmax(torch.randn(columns, generator=generator, dtype=torch.float64), 0)
    return x, y, a, b


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value.double() - reference).norm() / reference.norm())


def test_autocast_does_not_reach_the_products() -> None:
    x, y, a, b = (value.float() for value in features(20, 30))
    distance = pairwise_distance(x, y)
    expected = sinkhorn(distance, a, b, epsilon=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_distance(x, y), distance)
        assert torch.equal(sinkhorn(distance, a, b, epsilon=0.1).plan, expected.plan)


def test_the_envelope_gradient_agrees_with_differentiating_sinkhorn() -> None:
    x, y, a, b = features(12, 15)
    reference_x = x.clone().requires_grad_()
    reference_value(torch.cdist(reference_x, y) / 3.0, a, b, 0.05).backward()
    assert reference_x.grad is not None
    ours = x.float().requires_grad_()
    cost = pairwise_distance(ours, y.float()) / 3.0
    solved = sinkhorn(cost, a, b, epsilon=0.05, iterations=2000, tolerance=1e-6)
    assert not solved.plan.requires_grad
    transport_loss(cost, solved.plan).backward()
    assert ours.grad is not None
    assert relative(ours.grad, reference_x.grad) < 1e-3


def test_the_divergence_and_its_gradient_agree_with_float64() -> None:
    x, y, a, b = features(12, 15)
    reference_x = x.clone().requires_grad_()

    def distance(left: Tensor, right: Tensor) -> Tensor:
        # A root whose derivative at 0 is finite: the diagonal of a self-term.
        square = (left[:, None] - right).square().sum(2)
        return torch.where(square > 0, square, 1.0).sqrt() * (square > 0) / 3.0

    expected = reference_value(distance(reference_x, y), a, b, 0.1)
    expected = expected - reference_value(distance(reference_x, reference_x), a, a, 0.1) / 2
    expected = expected - reference_value(distance(y, y), b, b, 0.1) / 2
    expected.backward()
    assert reference_x.grad is not None
    ours, y = x.float().requires_grad_(), y.requires_grad_()
    value = sinkhorn_divergence(
        ours, y, a, b, epsilon=0.1, scale=3.0, iterations=2000, tolerance=1e-6
    )
    value.backward()
    assert y.grad is None
    assert ours.grad is not None
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert relative(ours.grad, reference_x.grad) < 1e-3


@pytest.mark.parametrize("start_epsilon", [None, 1.0])
def test_the_divergence_is_zero_for_equal_measures_only(start_epsilon: float | None) -> None:
    x, y, a, b = features(12, 15)

    def divergence(left: Tensor, right: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return sinkhorn_divergence(
            left,
            right,
            p,
            q,
            epsilon=0.05,
            scale=3.0,
            iterations=1000,
            tolerance=1e-6,
            start_epsilon=start_epsilon,
        )

    ours = x.float().requires_grad_()
    same = divergence(ours, x, a, a)
    same.backward()
    assert ours.grad is not None
    assert same.item() == pytest.approx(0.0, abs=1e-5)
    # A sample's gradient is at most its mass over the scale.
    assert float((ours.grad.norm(dim=1) / a).max()) < 1e-2 / 3.0
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert divergence(x, x[order], a, a[order]).item() == pytest.approx(0.0, abs=1e-5)
    assert divergence(x, y, a, b).item() > 0.01
    assert divergence(x, x, a, a.flip(0)).item() > 1e-3


def test_distances_agree_with_float64_also_far_from_the_origin() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(n, 64, generator=generator) + 20.0 for n in (30, 40))
    expected = torch.from_numpy(
        np.linalg.norm(x.double().numpy()[:, None] - y.double().numpy(), axis=2)
    )
    torch.testing.assert_close(pairwise_distance(x, y).double(), expected, rtol=1e-5, atol=0)


def test_the_derivative_of_a_distance_of_zero_is_zero() -> None:
    x = torch.tensor([[1.0, 2.0], [4.0, 6.0]], requires_grad=True)
    distance = pairwise_distance(x, x.detach())
    distance.sum().backward()
    torch.testing.assert_close(distance.detach(), torch.tensor([[0.0, 5.0], [5.0, 0.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[-0.6, -0.8], [0.6, 0.8]]))


def converged_plan(cost: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    """Ascend the semi-dual on a fixed problem until the marginals hold."""
    potentials = torch.zeros_like(mass)
    for _ in range(20_000):
        plan = semi_dual_plan(cost, mass.log().expand_as(cost), potentials.expand_as(cost), epsilon)
        potentials = potentials + 0.05 * (mass - plan.mean(0))
    return plan


def test_the_semi_dual_agrees_with_sinkhorn() -> None:
    generator = torch.Generator().manual_seed(5)
    cost = torch.rand(12, 5, generator=generator)
    mass = torch.softmax(torch.randn(5, generator=generator), 0)
    plan = converged_plan(cost, mass, epsilon=0.05).double().numpy() / 12
    uniform = np.full(12, 1 / 12)
    target = mass.double().numpy()
    target = target / target.sum()
    reference = ot.sinkhorn(uniform, target, cost.double().numpy(), 0.05, method="sinkhorn_log")
    np.testing.assert_allclose(plan, reference, atol=2e-4)
    np.testing.assert_allclose(plan.sum(0), target, atol=2e-4)


def test_the_transport_cost_approaches_exact_transport() -> None:
    generator = torch.Generator().manual_seed(6)
    student = torch.randn(10, 3, generator=generator)
    prototypes = torch.randn(4, 3, generator=generator)
    mass = torch.full((4,), 0.25)
    cost = torch.cdist(student, prototypes)
    plan = converged_plan(cost, mass, epsilon=0.01)
    value = float(transport_loss(cost, plan / 10))
    exact = ot.emd2(np.full(10, 0.1), mass.double().numpy(), cost.double().numpy())
    assert value == pytest.approx(exact, rel=0.01)


def test_the_envelope_gradient_agrees_with_differentiating_the_semi_dual() -> None:
    """The derivative of the semi-dual's objective, by autograd in float64."""
    generator = torch.Generator().manual_seed(7)
    prototypes = torch.randn(4, 3, generator=generator).double()
    mass = torch.softmax(torch.randn(4, generator=generator), 0).double()
    v = torch.randn(4, generator=generator).double() * 0.1
    z = torch.randn(6, 3, generator=generator).double()
    epsilon = 0.1
    reference_input = z.clone().requires_grad_()
    scores = (v - torch.cdist(reference_input, prototypes)) / epsilon + mass.log()
    (-epsilon * torch.logsumexp(scores, 1)).mean().backward()
    ours = z.clone().requires_grad_()
    cost = torch.cdist(ours, prototypes)
    plan = semi_dual_plan(cost.detach(), mass.log().expand_as(cost), v.expand_as(cost), epsilon)
    (plan.double() * cost).sum(1).mean().backward()
    assert reference_input.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, reference_input.grad, rtol=1e-4, atol=1e-6)


def test_costs_of_hundreds_of_epsilons_stay_finite_in_bfloat16() -> None:
    cost = torch.tensor([[0.0, 226.0, 113.0], [226.0, 226.0, 226.0]], dtype=torch.bfloat16)
    log_mass = torch.full((2, 3), math.log(1 / 3), dtype=torch.bfloat16)
    plan = semi_dual_plan(cost, log_mass, torch.zeros(2, 3), epsilon=1.0)
    assert torch.isfinite(plan).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(2))
    torch.testing.assert_close(plan[1], torch.full((3,), 1 / 3))


def test_a_class_without_prototypes_sends_nothing() -> None:
    plan = semi_dual_plan(torch.ones(1, 2), torch.full((1, 2), -math.inf), torch.zeros(1, 2), 0.1)
    assert plan.tolist() == [[0.0, 0.0]]


def test_epsilon_is_annealed_geometrically_to_half_way() -> None:
    path = [annealed_epsilon(step, 100, 0.1, 0.02) for step in (0, 25, 50, 99)]
    assert path == pytest.approx([0.1, math.sqrt(0.1 * 0.02), 0.02, 0.02])
