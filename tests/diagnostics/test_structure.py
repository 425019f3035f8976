from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr

from cmkd_scale.diagnostics.structure import LEAST_CLASSES, class_means, structure_agreement

Floats = NDArray[np.float64]


def two_digits(seed: int, size: int = 5, noise: float = 0.1) -> Floats:
    """[size^2, 2 size] means of classes that share halves, as two-digit numbers do."""
    rng = np.random.default_rng(seed)
    half = np.eye(size)
    means = [np.concatenate([half[i], half[j]]) for i in range(size) for j in range(size)]
    return np.array(means) + noise * rng.normal(size=(size * size, 2 * size))


def test_the_correlation_is_spearmans_class_by_class() -> None:
    ours, theirs = two_digits(0), two_digits(1)
    found = structure_agreement(ours, theirs, permutations=9)
    assert found is not None
    rows = []
    for i in range(25):
        others = np.arange(25) != i
        first, second = (cdist(means[[i]], means[others])[0] for means in (ours, theirs))
        rows.append(spearmanr(first, second).statistic)
    assert found.correlation == pytest.approx(np.mean(rows), abs=1e-9)
    assert found.classes == 25


def test_a_structure_that_is_shared_is_told_from_one_under_wrong_names() -> None:
    ours, theirs = two_digits(0), two_digits(1)
    right = structure_agreement(ours, theirs)
    rng = np.random.default_rng(3)
    wrong = [structure_agreement(ours, theirs[rng.permutation(25)]) for _ in range(20)]
    assert right is not None
    assert right.z > 6
    assert right.p == pytest.approx(1 / 500)
    assert all(other is not None and abs(other.z) < 4 for other in wrong)


def test_under_the_null_z_and_p_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    found = [
        structure_agreement(rng.normal(size=(12, 6)), rng.normal(size=(12, 6)), permutations=99)
        for _ in range(200)
    ]
    z = np.array([agreement.z for agreement in found if agreement is not None])
    p = np.array([agreement.p for agreement in found if agreement is not None])
    assert abs(z.mean()) < 0.3
    assert 0.8 < z.std() < 1.25
    assert 0.01 <= (p <= 0.05).mean() <= 0.11  # 5 % within four standard errors


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_scale_rotation_and_place_of_a_space_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = two_digits(seed, size=3), two_digits(seed + 1, size=3)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    plain = structure_agreement(ours, theirs, permutations=9)
    moved = structure_agreement(ours @ turn * 7.0 + 100.0, theirs, permutations=9)
    assert plain is not None
    assert moved is not None
    assert moved.correlation == pytest.approx(plain.correlation, abs=0.1)


def test_a_teacher_to_whom_all_classes_are_equally_unlike_says_nothing() -> None:
    found = structure_agreement(two_digits(0), 3.0 * np.eye(25) + 50.0)
    assert found is not None
    assert found.correlation == pytest.approx(0.0, abs=1e-12)
    assert abs(found.z) < 1


def test_classes_that_one_side_lacks_are_left_out() -> None:
    ours, theirs = two_digits(0), two_digits(1)
    ours[3] = np.nan
    theirs[7] = np.nan
    found = structure_agreement(ours, theirs)
    kept = np.delete(np.arange(25), [3, 7])
    assert found == structure_agreement(ours[kept], theirs[kept])


def test_of_very_many_classes_some_are_drawn() -> None:
    found = structure_agreement(two_digits(0, 8), two_digits(1, 8), most_classes=30)
    assert found is not None
    assert found.classes == 30
    assert found.z > 3


def test_too_few_classes_tell_nothing() -> None:
    few = np.eye(LEAST_CLASSES - 1)
    assert structure_agreement(few, few) is None


def test_means_of_classes() -> None:
    means = class_means(np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([2, 0]))
    assert means[0].tolist() == [1.0, 2.0]
    assert np.isnan(means[1]).all()
