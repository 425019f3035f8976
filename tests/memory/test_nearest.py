from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from cmkd_scale.memory import nearest as module
from cmkd_scale.memory.nearest import nearest


@pytest.fixture(params=["with FAISS", "without FAISS"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "faiss":
            raise ImportError(name)
        return real(name, *rest, **named)

    if request.param == "without FAISS":
        monkeypatch.setattr(builtins, "__import__", without_faiss)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("count", "offset"), [(300, 0.0), (300, 500.0), (20_500, 0.0)])
def test_the_nearest_of_all(count: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ENTRIES", 7 * count)  # of 50 features, seven at a time
    generator = torch.Generator().manual_seed(count)
    prototypes = torch.randn(count, 6, generator=generator) + offset
    features = torch.randn(50, 6, generator=generator) + offset
    distances, ids = nearest(prototypes, features, 5)
    search = NearestNeighbors(algorithm="brute").fit(prototypes.double().numpy())
    expected = search.kneighbors(features.double().numpy(), 5)
    np.testing.assert_allclose(distances, expected[0], atol=1e-4)
    apart = (features.unsqueeze(1) - prototypes[ids]).double().norm(dim=2)
    np.testing.assert_allclose(apart, expected[0], atol=1e-5)


@pytest.mark.usefixtures("either_way")
def test_no_feature_has_no_neighbour() -> None:
    distances, ids = nearest(torch.ones(4, 3), torch.zeros(0, 3), 2)
    assert distances.shape == ids.shape == (0, 2)
