from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cmkd_scale.memory.covariance import low_rank_factor, within_variance


def features(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + 5.0


@pytest.mark.parametrize(("count", "dim"), [(50, 6), (12, 30), (8, 8)])
def test_rows_are_principal_directions_as_long_as_their_deviation(count: int, dim: int) -> None:
    rows = features(count, dim)
    factor = low_rank_factor(rows, 3)
    reference = PCA(3, svd_solver="full").fit(rows.double().numpy())
    deviations = np.sqrt(reference.explained_variance_ * (count - 1) / count)
    np.testing.assert_allclose(factor.norm(dim=1), deviations, rtol=1e-6)
    cosines = (factor.double().numpy() / deviations[:, None] * reference.components_).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1.0, atol=1e-6)
    largest = factor.gather(1, factor.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize(("count", "dim"), [(40, 5), (9, 20)])
def test_a_full_factor_is_the_whole_covariance(count: int, dim: int) -> None:
    rows = features(count, dim)
    factor = low_rank_factor(rows, 20).double().numpy()
    expected = np.cov(rows.double().numpy().T, bias=True)
    np.testing.assert_allclose(factor.T @ factor, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize(("count", "spanned"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_few_samples_span_few_directions(count: int, spanned: int) -> None:
    factor = low_rank_factor(features(count, 6), 4)
    assert factor.shape == (4, 6)
    assert (factor.norm(dim=1) > 0).tolist() == [row < spanned for row in range(4)]


def test_a_factor_is_shortened_only_where_it_exceeds_the_variance() -> None:
    rows = features(50, 6)
    factor, variance = low_rank_factor(rows, 3), rows.var(0, correction=0)
    assert torch.equal(within_variance(factor, variance), factor)
    variance[1], variance[4] = 0.5 * factor[:, 1].square().sum(), 0.0
    tables = within_variance(factor.expand(2, 3, 6), torch.stack([variance, 1e6 * variance]))
    short = tables[0].double().numpy()
    same = np.array([True, False, True, True, False, True])
    np.testing.assert_array_equal(short[:, same], factor.numpy()[:, same])
    np.testing.assert_allclose(short[:, 1], factor.numpy()[:, 1] / np.sqrt(2.0), rtol=1e-5)
    assert (short[:, 4] == 0.0).all()
    assert (variance.double().numpy() - (short**2).sum(0) >= 0.0).all()
    whole = short.T @ short + np.diag(variance.double().numpy() - (short**2).sum(0))
    assert np.linalg.eigvalsh(whole).min() > -1e-12
    assert (tables[1, :, same] == factor[:, same]).all()


def test_equal_samples_have_no_direction() -> None:
    assert low_rank_factor(torch.full((7, 3), 2.5), 2).abs().max() == 0
    assert low_rank_factor(features(7, 3), 0).shape == (0, 3)
