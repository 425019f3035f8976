from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cmkd_scale.memory.covariance import low_rank_factor


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


def test_equal_samples_have_no_direction() -> None:
    assert low_rank_factor(torch.full((7, 3), 2.5), 2).abs().max() == 0
    assert low_rank_factor(features(7, 3), 0).shape == (0, 3)
