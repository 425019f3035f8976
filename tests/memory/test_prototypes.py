from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.prototypes import cluster, prototype_count


def blobs(seed: int, per_blob: int = 40, count: int = 5, dim: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 3.0 * rng.standard_normal((count, dim))
    points = centres[:, None] + rng.standard_normal((count, per_blob, dim))
    return points.reshape(-1, dim).astype(np.float32)


def test_distortion_is_within_one_percent_of_scikit_learn() -> None:
    points = blobs(0)
    ours = cluster(points, 5, seed=3)
    reference = KMeans(5, n_init=10, random_state=0).fit(points)
    assert float((ours.distance**2).sum()) <= 1.01 * reference.inertia_


def test_assignment_and_distance_belong_to_the_centres() -> None:
    points = blobs(1)
    found = cluster(points, 4, seed=0)
    distances = np.linalg.norm(points[:, None] - found.centres[None], axis=2)
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    np.testing.assert_allclose(found.distance, distances.min(1), atol=1e-3)
    masses = np.bincount(found.assignment)
    assert (np.diff(masses) <= 0).all(), "prototypes stand in order of falling mass"


def test_the_same_seed_gives_the_same_bits() -> None:
    points = blobs(2)
    one, other = cluster(points, 6, seed=1), cluster(points.copy(), 6, seed=1)
    assert one.centres.tobytes() == other.centres.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_classes_of_few_or_equal_samples(count: int) -> None:
    points = np.ones((count, 3), dtype=np.float32)
    found = cluster(points, prototype_count(count, None), seed=0)
    np.testing.assert_allclose(found.centres, [[1.0, 1.0, 1.0]])
    assert found.assignment.tolist() == [0] * count
    np.testing.assert_allclose(found.distance, 0.0, atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "wanted", "expected"),
    [(0, None, 0), (1, None, 1), (3, None, 1), (40, None, 6), (10**6, None, 64), (40, 30, 20)],
)
def test_the_rule_for_the_number_of_prototypes(
    samples: int, wanted: int | None, expected: int
) -> None:
    assert prototype_count(samples, wanted) == expected


def test_a_missing_faiss_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_faiss(name: str, *rest: Any, **named: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(UsageError, match=r"cmkd_scale\[cpu\]"):
        cluster(blobs(0), 2, seed=0)
