"""Confusions, groups and the plane, compared with scikit-learn and with counting by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix

from cmkd_scale.monitoring.report_analysis import (
    Predictions,
    confusion_counts,
    hardest_pairs,
    label_groups,
    project,
)

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def predictions(pairs: list[tuple[int, int]]) -> Predictions:
    array = np.array(pairs, dtype=np.int64)
    return Predictions(tuple("abcde"), array[:, 0], array[:, 1], np.zeros((len(pairs), 2), "f4"))


@given(PAIRS, PAIRS)
def test_confusions_are_those_of_all_runs_together(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    counts = confusion_counts([predictions(first), predictions(second)])
    labels, guesses = zip(*first, *second, strict=True)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, guesses, labels=range(5)))


@given(PAIRS, st.integers(1, 30))
def test_hardest_pairs_are_the_most_frequent_confusions(
    pairs: list[tuple[int, int]], limit: int
) -> None:
    of_class = Counter(true for true, _ in pairs)
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    expected = sorted(
        ((true, guess, n, n / of_class[true]) for (true, guess), n in wrong.items()),
        key=lambda row: (-row[2], row[0], row[1]),
    )
    assert hardest_pairs(confusion_counts([predictions(pairs)]), limit) == expected[:limit]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["cat", "car"], ["cat", "car"]),
        ([f"{i:02}" for i in range(21)], ["0…"] * 10 + ["1…"] * 10 + ["2…"]),
        (
            [f"class_{i:02}" for i in range(21)],
            ["class_0…"] * 10 + ["class_1…"] * 10 + ["class_2…"],
        ),
    ],
)
def test_many_labels_are_grouped_by_the_first_character_that_differs(
    names: list[str], groups: list[str]
) -> None:
    assert label_groups(names) == groups


def test_the_plane_is_that_of_a_pca_fitted_on_prototypes_alone() -> None:
    rng = np.random.default_rng(0)
    prototypes = (rng.normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1] + 7).astype(np.float32)
    features = rng.normal(size=(25, 6)).astype(np.float32)
    plane = project(prototypes, features)
    assert plane is not None
    pca = PCA(2, svd_solver="full").fit(prototypes.astype(np.float64))
    expected = pca.transform(features.astype(np.float64))
    sign = np.sign((expected * plane.features).sum(axis=0))
    np.testing.assert_allclose(plane.features, expected * sign, atol=1e-4)
    np.testing.assert_allclose(plane.variance_share, pca.explained_variance_ratio_, rtol=1e-4)


def test_the_sign_of_an_axis_does_not_depend_on_the_order_of_prototypes() -> None:
    rng = np.random.default_rng(1)
    prototypes = (rng.normal(size=(30, 5)) * [4, 2, 1, 1, 1]).astype(np.float32)
    first, second = project(prototypes, prototypes), project(prototypes[::-1], prototypes)
    assert first is not None
    assert second is not None
    np.testing.assert_allclose(first.features, second.features, atol=1e-4)


@pytest.mark.parametrize(
    ("prototypes", "features"), [((5, 4), (3, 6)), ((2, 4), (3, 4)), ((5, 1), (3, 1))]
)
def test_no_plane_without_three_prototypes_in_the_features_space(
    prototypes: tuple[int, int], features: tuple[int, int]
) -> None:
    assert project(np.ones(prototypes, "f4"), np.ones(features, "f4")) is None


def test_equal_prototypes_are_no_division_by_zero() -> None:
    plane = project(np.ones((4, 3), "f4"), np.zeros((2, 3), "f4"))
    assert plane is not None
    assert plane.variance_share == (0.0, 0.0)
