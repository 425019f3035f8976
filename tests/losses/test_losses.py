from __future__ import annotations

import inspect
import math

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses import LOSSES
from cmkd_scale.losses.classification import smoothed_cross_entropy
from cmkd_scale.losses.feature_alignment import transport_cost
from cmkd_scale.losses.head_transfer import head_pull
from cmkd_scale.losses.label_alignment import (
    exclude_classes,
    soft_label_divergence,
    teacher_head_cross_entropy,
)
from cmkd_scale.losses.sinkhorn import annealed_epsilon, semi_dual_plan

ALL = torch.ones(4, dtype=torch.bool)


def logits_and_labels(batch: int = 6, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=generator)
    return logits, torch.randint(classes, (batch,), generator=generator)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_table_names_the_arguments_that_its_functions_take(name: str) -> None:
    loss = LOSSES[name]
    assert set(loss.needs) == set(inspect.signature(loss.function).parameters)


def test_smoothing_against_its_definition() -> None:
    logits, labels = logits_and_labels()
    scores = logits.double().numpy()
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = np.full(log_p.shape, 0.1 / 4)
    target[np.arange(6), labels.numpy()] += 0.9
    expected = -(target * log_p).sum(1).mean()
    assert float(smoothed_cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_divergence_against_its_definition() -> None:
    logits, _ = logits_and_labels()
    soft = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), 1)
    known = torch.tensor([True, True, False, True, True, True])
    value = soft_label_divergence(logits, soft, known, ALL, temperature=4.0)
    scores, q = logits.double().numpy() / 4.0, soft.double().numpy()
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    rows = (q * np.log(q / p)).sum(1) * known.numpy()
    assert float(value) == pytest.approx(16.0 * rows.sum() / 6, rel=1e-4)


def test_divergence_is_over_shared_classes_only() -> None:
    logits, _ = logits_and_labels()
    shared = torch.tensor([True, True, False, True])
    soft = torch.softmax(logits[:, shared] / 4.0, 1)
    spread = torch.zeros(6, 4)
    spread[:, shared] = soft
    logits = logits.clone().requires_grad_()
    known = torch.ones(6, dtype=torch.bool)
    value = soft_label_divergence(logits, spread, known, shared, temperature=4.0)
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2] == 0).all()


def test_the_label_gradient_depends_on_the_teachers_head() -> None:
    # In the released reference two random heads give bitwise equal gradients.
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    _, labels = logits_and_labels()
    gradients = []
    for seed in (3, 4):
        head = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        z = features.clone().requires_grad_()
        known = torch.ones(6, dtype=torch.bool)
        teacher_head_cross_entropy(exclude_classes(z @ head.T, ALL), labels, known).backward()
        assert z.grad is not None
        gradients.append(z.grad)
    assert not torch.allclose(gradients[0], gradients[1])


def test_samples_unknown_to_the_teacher_add_nothing() -> None:
    logits, labels = logits_and_labels()
    known = torch.zeros(6, dtype=torch.bool)
    assert float(teacher_head_cross_entropy(logits, labels, known)) == 0.0
    assert float(transport_cost(torch.ones(6, 3), torch.ones(6, 3), known)) == 0.0


def test_head_pull_counts_shared_rows() -> None:
    student, teacher = torch.ones(4, 3), torch.zeros(4, 3)
    shared = torch.tensor([True, False, False, True])
    assert float(head_pull(student, teacher, shared)) == pytest.approx(3.0)


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
    value = float(transport_cost(cost, plan, torch.ones(10, dtype=torch.bool)))
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
    plan = semi_dual_plan(
        torch.ones(1, 2), torch.full((1, 2), float("-inf")), torch.zeros(1, 2), 0.1
    )
    assert plan.tolist() == [[0.0, 0.0]]


def test_epsilon_is_annealed_geometrically_to_half_way() -> None:
    path = [annealed_epsilon(step, 100, 0.1, 0.02) for step in (0, 25, 50, 99)]
    assert path == pytest.approx([0.1, math.sqrt(0.1 * 0.02), 0.02, 0.02])
