from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.spatial.distance import pdist
from torch import Tensor

from cmkd_scale.losses.moments import coral, mmd, pooled_moments

Array = npt.NDArray[np.float64]


def features(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Array:
    """Autograd's, in float32."""
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return np.asarray(found.double().numpy())


def finite_differences(loss: Callable[[Array], float], x: Tensor) -> Array:
    """Of a function in float64."""
    values = x.double().numpy()
    flat = approx_fprime(values.ravel(), lambda v: loss(v.reshape(values.shape)), 1e-7)
    return np.asarray(flat).reshape(values.shape)


def class_samples() -> list[Array]:
    """Three classes of 5, 40 and 15 samples, each with its own mean and covariance."""
    generator = np.random.default_rng(0)
    return [
        generator.normal(size=(count, 4)) @ generator.normal(size=(4, 4)) + 3.0 * place
        for place, count in enumerate((5, 40, 15))
    ]


def class_moments(samples: list[Array], rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, variances, factors by singular values, shares."""
    factors = []
    for x in samples:
        _, lengths, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
        factors.append((directions * lengths[:, None] / math.sqrt(len(x)))[:rank])
    counts = np.array([len(x) for x in samples])
    parts = (
        np.stack([x.mean(0) for x in samples]),
        np.stack([x.var(0) for x in samples]),
        np.stack(factors),
        counts / counts.sum(),
    )
    mean, variance, factor, share = (torch.from_numpy(part).float() for part in parts)
    return mean, variance, factor, share


def coral_by_hand(x: Array, mean: Array, covariance: Array) -> float:
    """Entry by entry."""
    count, dim = x.shape
    total = 0.0
    for i in range(dim):
        total += (x[:, i].mean() - mean[i]) ** 2 / dim
        for j in range(dim):
            products = (x[:, i] - x[:, i].mean()) * (x[:, j] - x[:, j].mean())
            total += (products.sum() / (count - 1) - covariance[i, j]) ** 2 / (4 * dim**2)
    return float(total)


def mmd_by_hand(x: Array, y: Array, mass: Array, unit: float) -> float:
    """Pair by pair."""

    def kernel(a: Array, b: Array) -> float:
        square = float(((a - b) ** 2).sum())
        return sum(math.exp(-square / (factor * unit)) for factor in (1, 2, 4, 8, 16))

    total = sum(kernel(a, b) for a in x for b in x) / len(x) ** 2
    total -= (
        2 * sum(m * kernel(a, b) for a in x for b, m in zip(y, mass.tolist(), strict=True)) / len(x)
    )
    pairs = list(zip(y, mass.tolist(), strict=True))
    return float(total + sum(m * n * kernel(a, b) for a, m in pairs for b, n in pairs))


def median_square(points: Array) -> float:
    """The lower of the two middle ones."""
    squares = np.sort(pdist(points) ** 2)
    return float(squares[(len(squares) - 1) // 2])


def test_coral_and_its_gradient_against_its_definition() -> None:
    x, teacher = features(7), features(30, 1).double().numpy() * 2.0
    mean, covariance = teacher.mean(0), np.cov(teacher.T)

    def loss(z: Tensor) -> Tensor:
        return coral(z, torch.from_numpy(mean), torch.from_numpy(covariance))

    def expected(z: Array) -> float:
        return coral_by_hand(z, mean, covariance)

    assert float(loss(x)) == pytest.approx(expected(x.double().numpy()), rel=1e-5)
    np.testing.assert_allclose(slope(loss, x), finite_differences(expected, x), 1e-3, 1e-5)


def test_coral_is_zero_where_moments_are_equal_and_only_there() -> None:
    x = features(9)
    mean, covariance = x.mean(0), torch.cov(x.T)
    assert float(coral(x, mean, covariance)) == pytest.approx(0.0, abs=1e-10)
    assert float(coral(x.flip(0), mean, covariance)) == pytest.approx(0.0, abs=1e-10)
    assert float(coral(x + 1.0, mean, covariance)) == pytest.approx(1.0, rel=1e-4)
    assert float(coral(2.0 * (x - mean) + mean, mean, covariance)) > 1e-2


def test_coral_pulls_the_mean_alone_of_one_sample_or_of_equal_ones() -> None:
    mean, covariance = torch.zeros(4), 2.0 * torch.eye(4)
    for count in (1, 3):
        x = torch.full((count, 4), 3.0)
        # 4 entries of 2^2 over 4 * 16, and 3^2.
        assert float(coral(x, mean, covariance)) == pytest.approx(0.25 + 9.0)
        expected = np.full((count, 4), 2 * 3.0 / 4 / count)
        np.testing.assert_allclose(slope(lambda z: coral(z, mean, covariance), x), expected, 1e-5)


def test_pooled_moments_with_full_factors_are_those_of_all_samples() -> None:
    samples = class_samples()
    mean, covariance = pooled_moments(*class_moments(samples, rank=4))
    everything = np.concatenate(samples)
    np.testing.assert_allclose(mean.numpy(), everything.mean(0), 1e-5)
    np.testing.assert_allclose(covariance.numpy(), np.cov(everything.T, bias=True), 1e-4, 1e-4)
    assert mean.dtype == covariance.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_pooled_variances_are_exact_whatever_the_rank(rank: int) -> None:
    samples = class_samples()
    mean, variance, factor, share = class_moments(samples, rank)
    everything = np.concatenate(samples)
    _, covariance = pooled_moments(mean, variance, factor, share)
    np.testing.assert_allclose(covariance.diagonal().numpy(), everything.var(0), 1e-4)
    # Off the diagonal: between classes, and what the factors hold within them.
    exact = np.cov(everything.T, bias=True)
    held = np.cov(mean.double().numpy().T, aweights=share.double().numpy(), bias=True)
    for weight, rows in zip(share.tolist(), factor.double().numpy(), strict=True):
        held += weight * rows.T @ rows
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(covariance.numpy()[off], held[off], 1e-4, 1e-4)
    assert np.abs(covariance.numpy() - exact)[off].max() > 1e-2


def test_pooled_moments_do_not_read_classes_without_a_share() -> None:
    mean, variance, factor, share = class_moments(class_samples(), rank=2)
    share = torch.tensor([0.25, 0.0, 0.75])
    expected = pooled_moments(mean[[0, 2]], variance[[0, 2]], factor[[0, 2]], share[[0, 2]])
    mean[1], variance[1], factor[1] = math.nan, math.inf, 1e30
    for found, wanted in zip(pooled_moments(mean, variance, factor, share), expected, strict=True):
        assert torch.equal(found, wanted)


def test_mmd_and_its_gradient_against_a_double_loop() -> None:
    x, y = features(6), features(5, 1) + 0.5
    mass = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2])
    joint = np.concatenate([x.double().numpy(), y.double().numpy()])
    unit = median_square(joint)

    def expected(z: Array) -> float:
        return mmd_by_hand(z, y.double().numpy(), mass.double().numpy(), unit)

    assert float(mmd(x, y, mass)) == pytest.approx(expected(x.double().numpy()), rel=1e-4)
    found = slope(lambda z: mmd(z, y, mass), x)
    np.testing.assert_allclose(found, finite_differences(expected, x), 1e-3, 1e-5)
    assert np.abs(found).max() > 1e-2


def test_mmd_leaves_out_prototypes_without_mass() -> None:
    x, y = features(6), features(5, 1)
    mass = torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0])
    value = mmd(x, y, mass)
    # They would move the median if they counted.
    y[[1, 3, 4]] = 1e3
    assert float(mmd(x, y, mass)) == float(value)
    assert float(value) == pytest.approx(float(mmd(x, y[[0, 2]], torch.full((2,), 0.5))))


def test_mmd_of_points_that_are_all_equal_is_zero() -> None:
    prototypes, mass = torch.ones(2, 4), torch.tensor([0.25, 0.75])
    for count in (1, 3):
        x = torch.ones(count, 4)
        assert float(mmd(x, prototypes, mass)) == pytest.approx(0.0, abs=1e-6)
        assert (slope(lambda z: mmd(z, prototypes, mass), x) == 0).all()


@settings(max_examples=40)
@given(rows=st.integers(1, 10), seed=st.integers(0, 1000), apart=st.floats(0.5, 5.0))
def test_mmd_is_zero_for_one_distribution_and_positive_for_two(
    rows: int, seed: int, apart: float
) -> None:
    x = features(rows, seed)
    # The same points: twice each, with masses that add up to the batch's.
    halves = torch.full((2 * rows,), 0.5 / rows)
    assert float(mmd(x, torch.cat([x, x]).flip(0), halves)) == pytest.approx(0.0, abs=1e-5)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    other = features(rows, seed + 1) + apart
    value = float(mmd(x, torch.cat([other, other]), halves))
    assert value > 1e-3
    assert float(mmd(x[order], torch.cat([other, other]), halves)) == pytest.approx(value, abs=1e-5)
