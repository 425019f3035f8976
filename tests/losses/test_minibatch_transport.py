from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.minibatch_transport import Metric, deepjdot, jumbot, reference_transport

METRICS: tuple[Metric, ...] = ("cosine", "l2", "l1", "chordal")


def batches(
    rows: int = 8, columns: int = 11, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher features, student logits of 4 classes, teacher labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator).double() * scale
    y = torch.randn(columns, 5, generator=generator).double() * scale + 0.3
    logits = torch.randn(rows, 4, generator=generator).double() * 2.0
    return x, y, logits, torch.randint(4, (columns,), generator=generator)


def cost_by_hand(x: Tensor, y: Tensor, metric: Metric) -> Tensor:
    """Costs one pair at a time."""
    if metric in ("cosine", "chordal"):
        x = torch.stack([row / row.square().sum().sqrt() for row in x])
        y = torch.stack([row / row.square().sum().sqrt() for row in y])
    pairs = {
        "cosine": lambda a, b: 1.0 - (a * b).sum(),
        "l1": lambda a, b: (a - b).abs().sum(),
        "l2": lambda a, b: (a - b).square().sum().sqrt(),
        "chordal": lambda a, b: (a - b).square().sum().sqrt(),
    }
    return torch.stack([torch.stack([pairs[metric](a, b) for b in y]) for a in x])


def joint_cost(
    x: Tensor, y: Tensor, logits: Tensor, labels: Tensor, feature: float, label: float
) -> Tensor:
    """``feature ||x - y||^2 + label CE`` of each pair."""
    cost = x.new_zeros(len(x), len(y))
    for i, row in enumerate(x):
        for j, other in enumerate(y):
            surprise = torch.log(torch.exp(logits[i] - logits[i, labels[j]]).sum())
            cost[i, j] = feature * (row - other).square().sum() + label * surprise
    return cost


def pot_value(cost: Tensor, epsilon: float) -> tuple[Tensor, int]:
    """What the release calls, and its number of iterations."""
    a, b = (torch.full((size,), 1.0 / size, dtype=cost.dtype) for size in cost.shape)
    value, log = ot.sinkhorn2(a, b, cost, reg=epsilon, numItermax=100, log=True)
    return value, log["niter"] + 1


def gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 11), (8, 8), (1, 3), (3, 1)])
def test_the_references_term_is_pots_to_the_8th_digit(
    metric: Metric, rows: int, columns: int
) -> None:
    x, y, _, _ = batches(rows, columns, scale=0.5)
    x.requires_grad_()
    value = reference_transport(x, y, metric=metric)
    expected, _ = pot_value(cost_by_hand(x, y, metric), 0.1)
    assert value.dtype == torch.float64
    assert expected.item() > 0.1
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradient(value, x), gradient(expected, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("epsilon", "stops_early"), [(0.12, True), (0.02, False)])
def test_the_references_iterations_end_where_pots_do(epsilon: float, stops_early: bool) -> None:
    x, y, _, _ = batches()
    cost = cost_by_hand(x, y, "cosine")
    expected, iterations = pot_value(cost, epsilon)
    assert (iterations < 100) == stops_early
    value = reference_transport(x, y, epsilon=epsilon)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    # One iteration less than POT takes is another value; after its stop there are no more.
    fewer = reference_transport(x, y, epsilon=epsilon, iterations=iterations - 1)
    assert fewer.item() != value.item()
    same = reference_transport(x, y, epsilon=epsilon, iterations=iterations)
    assert same.item() == value.item()


def test_the_references_term_vanishes_where_its_kernel_underflows() -> None:
    # Distances of 70 at an epsilon of 0.1: exp(-700) is 0 in float32, and POT's value is 0.
    x, y, _, _ = batches(scale=20.0)
    x = x.float().requires_grad_()
    value = reference_transport(x, y.float(), metric="l2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = pot_value(torch.cdist(x.detach(), y.float()), 0.1)
    assert value.dtype == torch.float32
    assert value.item() == expected.item() == 0.0
    (slope,) = gradient(value, x)
    assert torch.equal(slope, torch.zeros_like(slope))


def test_the_references_gradient_against_finite_differences() -> None:
    x, y, _, _ = batches(4, 5)
    x.requires_grad_()

    def value(features: Tensor) -> Tensor:
        return reference_transport(features, y, epsilon=0.5, iterations=30)

    assert torch.autograd.gradcheck(value, (x,))


@pytest.mark.parametrize("metric", METRICS)
def test_the_references_gradient_is_finite_where_samples_are_equal(metric: Metric) -> None:
    x = torch.ones(3, 5, requires_grad=True)
    value = reference_transport(x, torch.ones(3, 5), metric=metric)
    assert value.item() == pytest.approx(0.0, abs=1e-3)
    assert torch.isfinite(gradient(value, x)[0]).all()


@pytest.mark.parametrize(("epsilon", "relaxation"), [(0.1, 0.5), (0.05, 1.0), (0.3, 0.05)])
def test_jumbot_against_pots_unbalanced_plan(epsilon: float, relaxation: float) -> None:
    x, y, logits, labels = batches()
    mean = float(np.square(x.numpy()[:, None] - y.numpy()[None]).sum(2).mean())
    x.requires_grad_()
    logits.requires_grad_()
    cost = joint_cost(x, y, logits, labels, 0.7 / mean, 0.2)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        ot.unif(8), ot.unif(11), cost.detach().numpy(), epsilon, relaxation, stopThr=1e-13
    )
    # A plan with less mass than either batch: this is not the balanced problem.
    assert plan.sum() < 0.98
    expected = (torch.from_numpy(plan) * cost).sum()
    a, b = x.detach().float().requires_grad_(), logits.detach().float().requires_grad_()
    strengths = {"epsilon": epsilon, "relaxation": relaxation}
    value = jumbot(a, y.float(), b, labels, cost_weight=0.7, label_weight=0.2, **strengths)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    # The reference's unit of distance is a constant, too.
    for ours, exact in zip(gradient(value, a, b), gradient(expected, x, logits), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-6)


def test_jumbot_does_not_depend_on_the_scale_of_features() -> None:
    x, y, logits, labels = (
        part.float() if part.is_floating_point() else part for part in batches()
    )
    value = jumbot(x, y, logits, labels)
    assert float(jumbot(1e3 * x, 1e3 * y, logits, labels)) == pytest.approx(value.item(), rel=1e-4)
    assert float(jumbot(x + 5.0, y, logits, labels)) != pytest.approx(value.item(), rel=1e-2)


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (4, 6), (6, 3), (1, 1), (1, 4)])
def test_deepjdot_against_pots_exact_transport(rows: int, columns: int) -> None:
    x, y, logits, labels = batches(rows, columns)
    x.requires_grad_()
    logits.requires_grad_()
    cost = joint_cost(x, y, logits, labels, 0.3, 0.8)
    exact = ot.emd2(ot.unif(rows), ot.unif(columns), cost.detach().numpy())
    plan = torch.from_numpy(ot.emd(ot.unif(rows), ot.unif(columns), cost.detach().numpy()))
    slopes = gradient((plan * cost).sum(), x, logits)
    a, b = x.detach().float().requires_grad_(), logits.detach().float().requires_grad_()
    value = deepjdot(a, y.float(), b, labels, feature_weight=0.3, label_weight=0.8)
    assert value.item() == pytest.approx(exact, rel=1e-5)
    for ours, expected in zip(gradient(value, a, b), slopes, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-6)


def test_labels_decide_deepjdots_matches_where_features_do_not() -> None:
    # Two pairs, features all equal: each prediction goes to the sample of its class.
    x = torch.zeros(2, 3, requires_grad=True)
    logits = torch.tensor([[0.0, 4.0], [4.0, 0.0]])
    value = deepjdot(x, torch.zeros(2, 3), logits, torch.tensor([0, 1]), label_weight=1.0)
    assert value.item() == pytest.approx(math.log1p(math.exp(-4.0)), rel=1e-5)
    assert torch.equal(gradient(value, x)[0], torch.zeros(2, 3))


def test_a_loss_that_has_diverged_says_so_and_does_not_stop_the_solver() -> None:
    x, y, logits, labels = batches()
    x[0, 0] = math.nan
    assert math.isnan(float(deepjdot(x.float(), y.float(), logits, labels)))
    assert math.isnan(float(jumbot(x.float(), y.float(), logits, labels)))
    assert math.isnan(float(reference_transport(x, y)))


@pytest.mark.parametrize("loss", [jumbot, deepjdot])
@pytest.mark.parametrize("samples", [1, 3])
def test_features_that_are_equal_are_not_moved(loss: Any, samples: int) -> None:
    x = torch.ones(samples, 4, requires_grad=True)
    logits = torch.zeros(samples, 2, requires_grad=True)
    labels = torch.zeros(samples, dtype=torch.int64)
    value = loss(x, torch.ones(samples, 4), logits, labels, label_weight=0.1)
    slope, label_slope = gradient(value, x, logits)
    assert torch.equal(slope, torch.zeros_like(slope))
    # What is left is the cross-entropy, log 2, and its slope.
    assert 0.08 * math.log(2.0) < value.item() < 0.1 * math.log(2.0) + 1e-6
    assert (label_slope[:, 0] < 0).all()
    torch.testing.assert_close(label_slope.sum(1), torch.zeros(samples))


@pytest.mark.parametrize("loss", [jumbot, deepjdot])
def test_teacher_features_are_constants(loss: Any) -> None:
    x, y, logits, labels = batches()
    y.requires_grad_()
    loss(x.requires_grad_(), y, logits, labels).backward()
    reference_transport(x, y).backward()
    assert y.grad is None


@settings(max_examples=30)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 1000))
def test_the_order_of_samples_does_not_matter(rows: int, columns: int, seed: int) -> None:
    x, y, logits, labels = batches(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(rows, generator=generator)
    second = torch.randperm(columns, generator=generator)
    for loss in (jumbot, deepjdot):
        value = loss(x, y, logits, labels)
        permuted = loss(x[first], y[second], logits[first], labels[second])
        torch.testing.assert_close(permuted, value, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        reference_transport(x[first], y[second]), reference_transport(x, y), rtol=1e-9, atol=1e-12
    )


def test_unusable_arguments_are_refused_with_the_remedy() -> None:
    x, y, logits, labels = batches()
    with pytest.raises(UsageError, match="got 8 of the student and 0 of the teacher"):
        reference_transport(x, y[:0])
    with pytest.raises(UsageError, match="got 0 of the student and 11"):
        deepjdot(x[:0], y, logits[:0], labels)
    with pytest.raises(UsageError, match=r"got 0\.1, inf: take"):
        jumbot(x, y, logits, labels, relaxation=math.inf)
    with pytest.raises(UsageError, match="positive, finite epsilon"):
        reference_transport(x, y, epsilon=0.0)
    with pytest.raises(UsageError, match="no metric 'cosin': choose cosine"):
        reference_transport(x, y, metric="cosin")  # type: ignore[arg-type]
    x, y, logits, labels = batches(64, 67)
    with pytest.raises(UsageError, match="of 64 and 67 is an assignment of 4288"):
        deepjdot(x, y, logits, labels)
