from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from torch import Tensor

from cmkd_scale.losses.contrast import prototype_contrast

Array = npt.NDArray[np.float64]
PROTOTYPE_CLASS = torch.tensor([0, 0, 0, 1, 2, 2, 4])


def problem(batch: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, labels of classes 0 to 2, prototypes (class 3 has none), shares."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 5, generator=generator)
    labels = torch.randint(3, (batch,), generator=generator)
    prototypes = torch.randn(7, 5, generator=generator)
    return x, labels, prototypes, torch.rand(batch, generator=generator) + 0.5


def cosines(x: Array, y: Array) -> Array:
    return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in y] for a in x])


def by_hand(x: Array, labels: Tensor, prototypes: Array, share: Array, tau: Array) -> float:
    """Sample by sample, positive by positive."""
    similarity = cosines(x, prototypes)
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        positives = [j for j, c in enumerate(PROTOTYPE_CLASS.tolist()) if c == label]
        partition = sum(math.exp(similarity[i, j] / tau[i, j]) for j in range(len(prototypes)))
        for j in positives:
            p = math.exp(similarity[i, j] / tau[i, j]) / partition
            total -= share[i] * math.log(p) / len(positives) / len(x)
    return total


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_value_and_gradient_against_their_definition(adaptive: bool, temperature: float) -> None:
    x, labels, prototypes, share = problem()
    z, t = x.double().numpy(), prototypes.double().numpy()
    tau = np.full((6, 7), temperature)
    if adaptive:
        tau += (1.0 + cosines(z, t)) / 2.0

    def expected(flat: Array) -> float:
        # The temperatures stay what they are at x: they are constants.
        return by_hand(flat.reshape(z.shape), labels, t, share.double().numpy(), tau)

    x.requires_grad_()
    value = prototype_contrast(
        x, labels, prototypes, PROTOTYPE_CLASS, share, temperature=temperature, adaptive=adaptive
    )
    assert value.item() == pytest.approx(expected(z.ravel()), rel=1e-5)
    (slope,) = torch.autograd.grad(value, x)
    differences = np.asarray(approx_fprime(z.ravel(), expected, 1e-7)).reshape(z.shape)
    np.testing.assert_allclose(slope.numpy(), differences, rtol=1e-3, atol=1e-5)


def test_classes_without_prototypes_add_nothing_and_have_no_gradient() -> None:
    x, labels, prototypes, share = problem()
    labels[0], labels[4] = 3, 3
    x.requires_grad_()
    value = prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, share)
    (slope,) = torch.autograd.grad(value, x)
    assert torch.equal(slope[[0, 4]], torch.zeros(2, 5))
    share[0] = share[4] = 0.0
    assert prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, share).item() == value.item()
    known = labels != 3
    alone = prototype_contrast(x[known], labels[known], prototypes, PROTOTYPE_CLASS, share[known])
    assert value.item() == pytest.approx(alone.item() * 4 / 6, rel=1e-6)


def test_a_share_of_zero_silences_a_sample_and_one_of_a_half_halves_it() -> None:
    x, labels, prototypes, _ = problem(2)

    def value(*share: float) -> float:
        weights = torch.tensor(share)
        return float(prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, weights))

    assert value(0.0, 0.0) == 0.0
    assert value(1.0, 0.5) == pytest.approx(value(1.0, 0.0) + 0.5 * value(0.0, 1.0), rel=1e-6)
    assert value(1.0, 0.0) > 0.0


@pytest.mark.parametrize("adaptive", [True, False])
def test_features_of_zero_and_opposite_ones_have_finite_gradients(adaptive: bool) -> None:
    _, _, prototypes, _ = problem()
    # The temperature of an opposite prototype is the lowest: 0.07, not negative.
    x = torch.stack([torch.zeros(5), -prototypes[0], prototypes[0]]).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64)
    value = prototype_contrast(
        x, labels, prototypes, PROTOTYPE_CLASS, torch.ones(3), adaptive=adaptive
    )
    (slope,) = torch.autograd.grad(value, x)
    assert math.isfinite(value.item())
    assert torch.isfinite(slope).all()


def test_prototypes_are_constants() -> None:
    x, labels, prototypes, share = problem()
    x.requires_grad_()
    prototypes.requires_grad_()
    prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, share).backward()
    assert prototypes.grad is None


@pytest.mark.parametrize("adaptive", [True, False])
def test_descent_turns_features_towards_their_class(adaptive: bool) -> None:
    x, labels, prototypes, share = problem()
    x.requires_grad_()
    own = labels.unsqueeze(1) == PROTOTYPE_CLASS

    def mass() -> float:
        with torch.no_grad():
            similarity = torch.from_numpy(cosines(x.numpy(), prototypes.numpy()))
        return float((torch.softmax(similarity / 0.07, 1) * own).sum(1).min())

    assert mass() < 0.1
    for _ in range(200):
        loss = prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, share, adaptive=adaptive)
        (slope,) = torch.autograd.grad(loss, x)
        with torch.no_grad():
            x -= 3.0 * slope
    assert mass() > 0.5


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), adaptive=st.booleans(), length=st.floats(0.1, 10.0))
def test_neither_lengths_nor_order_matter(seed: int, adaptive: bool, length: float) -> None:
    x, labels, prototypes, share = problem(seed=seed)
    value = prototype_contrast(x, labels, prototypes, PROTOTYPE_CLASS, share, adaptive=adaptive)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    other = prototype_contrast(
        length * x.flip(0),
        labels.flip(0),
        prototypes[order] / length,
        PROTOTYPE_CLASS[order],
        share.flip(0),
        adaptive=adaptive,
    )
    assert float(value) > 0.0
    assert float(other) == pytest.approx(float(value), rel=1e-4)
