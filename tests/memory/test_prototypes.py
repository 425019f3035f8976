from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from cmkd_scale.memory import seeding
from cmkd_scale.memory.prototypes import Clusters, cluster, lloyd_step, prototype_count

Rows = NDArray[np.float64]
Make = Callable[[np.random.Generator, int, int], Rows]


def gaussian(rng: np.random.Generator, n: int, dim: int) -> Rows:
    return rng.standard_normal((n, dim))


def blobs(rng: np.random.Generator, n: int, dim: int, count: int = 5) -> Rows:
    places: Rows = 3.0 * rng.standard_normal((count, dim))
    return places[np.arange(n) % count] + gaussian(rng, n, dim)


def anisotropic(rng: np.random.Generator, n: int, dim: int) -> Rows:
    own = rng.integers(8, size=n)
    places, widths = gaussian(rng, 8, dim)[own], np.exp(gaussian(rng, 8, dim)[own])
    points: Rows = places + 0.3 * widths * gaussian(rng, n, dim)
    return points


def manifold(rng: np.random.Generator, n: int, dim: int) -> Rows:
    folded: Rows = np.sin(2.0 * rng.random((n, 2)) @ rng.standard_normal((2, dim)))
    return folded


def points_of(make: Make, seed: int, n: int = 200, dim: int = 6) -> NDArray[np.float32]:
    return make(np.random.default_rng(seed), n, dim).astype(np.float32)


def distances_to(points: NDArray[np.float32], centres: NDArray[np.float32]) -> Rows:
    """[n, K] in float64."""
    distances: Rows = np.linalg.norm(
        points.astype(np.float64)[:, None] - centres.astype(np.float64), axis=2
    )
    return distances


def distortion(found: Clusters) -> float:
    return float((found.distance.astype(np.float64) ** 2).sum())


def test_distortion_is_within_one_percent_of_scikit_learn() -> None:
    ratios = []
    for make in (gaussian, blobs, anisotropic, manifold):
        ours, reference = 0.0, 0.0
        for seed in range(8):
            points = points_of(make, seed, n=600, dim=16)
            ours += distortion(cluster(points, 10, seed))
            reference += KMeans(10, n_init=1, random_state=seed).fit(points).inertia_
        ratios.append(ours / reference)
    assert np.mean(ratios) <= 1.01
    assert max(ratios) <= 1.03


@pytest.mark.parametrize("seed", range(20))
def test_every_one_of_sixteen_separate_clusters_gets_its_prototype(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(20, 200, size=16))[::-1]
    truth = rng.permutation(np.repeat(np.arange(16), sizes))
    points = 10.0 * rng.standard_normal((16, 8))[truth] + 0.1 * gaussian(rng, len(truth), 8)
    found = cluster(points.astype(np.float32), 16, seed)
    np.testing.assert_array_equal(found.sizes, sizes)
    assert all(len(set(truth[found.assignment == k])) == 1 for k in range(16))


def test_assignment_and_distance_belong_to_the_centres() -> None:
    points = points_of(blobs, 1)
    found = cluster(points, 4, seed=0)
    distances = distances_to(points, found.centres)
    np.testing.assert_array_equal(found.assignment, distances.argmin(1))
    np.testing.assert_allclose(found.distance, distances.min(1), atol=1e-5)
    np.testing.assert_array_equal(found.sizes, np.bincount(found.assignment))
    assert (np.diff(found.sizes) <= 0).all(), "prototypes stand in order of falling mass"


def test_the_same_bits_whatever_the_threads_and_the_memory() -> None:
    points = points_of(gaussian, 2, n=1000, dim=64)
    shifted = np.frombuffer(bytearray(4) + points.tobytes(), dtype=np.float32)[1:]
    results = []
    before = torch.get_num_threads()
    try:
        for threads, rows in ((1, points), (2, shifted.reshape(points.shape)), (2, points)):
            torch.set_num_threads(threads)
            found = cluster(rows, 16, seed=1)
            stepped = lloyd_step(rows, found.centres)
            assert torch.get_num_threads() == threads
            results.append(
                (found.centres.tobytes(), found.assignment.tobytes(), stepped.centres.tobytes())
            )
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1
    assert cluster(points, 16, seed=2).centres.tobytes() != results[0][0]


def test_samples_taken_in_blocks_give_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(blobs, 3, n=500)
    whole = cluster(points, 6, seed=0)
    monkeypatch.setattr(seeding, "_BLOCK", 64)
    parts = cluster(points, 6, seed=0)
    np.testing.assert_array_equal(whole.assignment, parts.assignment)
    np.testing.assert_allclose(whole.centres, parts.centres, atol=1e-5)


def test_features_far_from_the_origin_lose_nothing() -> None:
    points = points_of(blobs, 4, n=1000, dim=32) + np.float32(1000.0)
    found = cluster(points, 5, seed=0)
    near = cluster(points - np.float32(1000.0), 5, seed=0)
    np.testing.assert_array_equal(found.assignment, near.assignment)
    np.testing.assert_allclose(found.centres - 1000.0, near.centres, atol=1e-3)
    exact = distances_to(points, found.centres).min(1)
    np.testing.assert_allclose(found.distance, exact, atol=1e-3)


@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 300),
    prototypes=st.integers(1, 12),
    values=st.integers(1, 4),
)
def test_clusters_of_any_size_with_any_repetition(
    seed: int, samples: int, prototypes: int, values: int
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(values, size=(samples, 2)).astype(np.float32)
    found = cluster(points, prototypes, seed=seed)
    assert 1 <= len(found.centres) <= min(prototypes, len(np.unique(points, axis=0)))
    assert found.sizes.min() > 0
    assert found.sizes.sum() == samples
    distances = distances_to(points, found.centres)
    own = distances[np.arange(samples), found.assignment]
    np.testing.assert_allclose(own, distances.min(1), atol=1e-3)
    np.testing.assert_allclose(found.distance, own, atol=2e-3)


@pytest.mark.parametrize("samples", [3, 7, 90])
def test_as_many_prototypes_as_distinct_samples_leave_no_distance(samples: int) -> None:
    distinct = np.arange(14, dtype=np.float32).reshape(7, 2)[: min(7, samples)]
    points = distinct[np.arange(samples) % len(distinct)]
    found = cluster(points, 10, seed=0)
    np.testing.assert_allclose(np.unique(found.centres, axis=0), distinct, atol=1e-5)
    np.testing.assert_allclose(found.distance, 0.0, atol=5e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_classes_of_few_or_equal_samples(count: int) -> None:
    points = np.ones((count, 3), dtype=np.float32)
    found = cluster(points, 4, seed=0)
    np.testing.assert_array_equal(found.centres, [[1.0, 1.0, 1.0]])
    assert found.assignment.tolist() == [0] * count
    np.testing.assert_array_equal(found.distance, 0.0)


@pytest.mark.parametrize(
    ("samples", "wanted", "expected"),
    [(0, None, 0), (1, None, 1), (3, None, 1), (40, None, 6), (10**6, None, 64), (40, 30, 20)],
)
def test_the_rule_for_the_number_of_prototypes(
    samples: int, wanted: int | None, expected: int
) -> None:
    assert prototype_count(samples, wanted) == expected


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_pass_is_one_assignment_and_one_update(offset: float) -> None:
    points = points_of(blobs, 5) + np.float32(offset)
    start = points[::40].copy()
    found = lloyd_step(points, start)
    nearest = distances_to(points, start).argmin(1)
    means = [points[nearest == k].astype(np.float64).mean(0) for k in range(len(start))]
    np.testing.assert_array_equal(found.assignment, nearest)
    np.testing.assert_allclose(found.centres, means, atol=1e-3 if offset else 1e-5)
    moved = distances_to(points, found.centres)[np.arange(len(points)), nearest]
    np.testing.assert_allclose(found.distance, moved, atol=1e-3 if offset else 1e-5)


def test_a_prototype_without_samples_keeps_its_place_and_its_centre() -> None:
    points = points_of(blobs, 6)
    start = np.concatenate([points[:2], np.full((1, 6), 1e3, np.float32), points[2:4]])
    found = lloyd_step(points, start)
    assert found.sizes[2] == 0
    assert (found.sizes[[0, 1, 3, 4]] > 0).all()
    np.testing.assert_allclose(found.centres[2], start[2])
    assert len(found.sizes) == 5
    nobody = lloyd_step(points[:0], start)
    np.testing.assert_allclose(nobody.centres, start, atol=1e-3)


def test_passes_follow_a_teacher_that_moves() -> None:
    points = points_of(gaussian, 7)
    found = cluster(points, 5, seed=0)
    moved = points + np.float32(0.1)
    first = lloyd_step(moved, found.centres)
    later = first
    for _ in range(50):
        later = lloyd_step(moved, later.centres)
    # Where nothing changes any more, each prototype is the old one that has moved along.
    assert np.abs(later.centres - found.centres - 0.1).max() < 0.5
    assert distortion(later) <= distortion(first) * (1 + 1e-6)
    np.testing.assert_array_equal(lloyd_step(moved, later.centres).assignment, later.assignment)
