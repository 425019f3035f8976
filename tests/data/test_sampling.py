"""Which samples an epoch holds: exact counts, and every sample of a class equally often."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cmkd_scale.data.sampling import Labels, Natural, Sampling, Weighted, at_most, choose, quotas
from cmkd_scale.errors import UsageError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(
    lambda labels: np.array(labels, dtype=np.int32)
)
COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=50).filter(any)


def weighted(labels: NDArray[np.int32], sampling: Sampling = "balanced", seed: int = 0) -> Weighted:
    return Weighted(np.arange(len(labels)), labels, sampling=sampling, seed=seed, name="all")


def some_labels(count: int = 400, classes: int = 4, seed: int = 0) -> NDArray[np.int32]:
    """Labels of a few classes, -1 among them."""
    return np.random.default_rng(seed).integers(-1, classes, count, dtype=np.int32)


# ---------------------------------------------------------------------------------- natural


def test_all_samples_are_drawn_without_a_list_of_them() -> None:
    draw = Natural(7)
    assert (draw.samples, draw.places(0), draw.name) == (7, None, "natural all")
    assert Natural(7, np.arange(7)).places(3) is None


def test_a_subset_is_drawn_as_it_is() -> None:
    draw = Natural(7, np.array([1, 4]), name="labelled")
    places = draw.places(5)
    assert places is not None
    assert (draw.samples, places.tolist(), draw.name) == (2, [1, 4], "natural labelled")


# ----------------------------------------------------------------------------------- quotas


@given(counts=COUNTS, exponent=st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1))
def test_quotas_are_shares_up_to_one_and_add_up(counts: list[int], exponent: float) -> None:
    found = quotas(np.array(counts), exponent)
    assert found.sum() == sum(counts)
    weights = [count**exponent if count else 0.0 for count in counts]
    shares = np.array(weights) / sum(weights) * sum(counts)
    assert (abs(found - shares) < 1 + 1e-6).all()
    assert (found[np.array(counts) == 0] == 0).all()


@given(counts=COUNTS)
def test_no_class_that_has_samples_is_left_out(counts: list[int]) -> None:
    for exponent in (0.0, 0.5, 1.0):
        assert (quotas(np.array(counts), exponent)[np.array(counts) > 0] > 0).all()


@given(counts=COUNTS)
def test_exponent_one_changes_nothing(counts: list[int]) -> None:
    assert quotas(np.array(counts), 1.0).tolist() == counts


@pytest.mark.parametrize(
    ("counts", "exponent", "expected"),
    [
        ([1, 9], 0.0, [5, 5]),
        ([1, 9], 0.5, [3, 7]),  # 2.5 and 7.5: the earlier class wins
        ([16, 0, 4], 0.5, [13, 0, 7]),
        ([100, 1, 1], 0.0, [34, 34, 34]),
        ([8, 1, 2], 0.0, [4, 4, 3]),
    ],
)
def test_quotas_are_largest_remainders(
    counts: list[int], exponent: float, expected: list[int]
) -> None:
    assert quotas(np.array(counts), exponent).tolist() == expected


# --------------------------------------------------------------------------------- weighted


@pytest.mark.parametrize(("sampling", "exponent"), [("balanced", 0.0), ("square_root", 0.5)])
@given(labels=LABELS, seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_every_epoch_holds_the_quotas(
    sampling: Sampling, exponent: float, labels: NDArray[np.int32], seed: int, epoch: int
) -> None:
    draw = weighted(labels, sampling, seed)
    places = draw.places(epoch)
    assert draw.samples == len(places) == len(labels)
    assert (np.diff(places) >= 0).all()
    drawn = np.bincount(labels[places], minlength=6)
    assert drawn.tolist() == quotas(np.bincount(labels, minlength=6), exponent).tolist()
    times = Counter(places.tolist())
    for label in set(labels.tolist()):
        of_class = [times[place] for place in np.flatnonzero(labels == label).tolist()]
        assert max(of_class) - min(of_class) <= 1


@pytest.mark.parametrize("sampling", ["balanced", "square_root"])
@given(labels=LABELS, seed=st.integers(0, 2**40), epochs=st.integers(1, 12))
def test_after_any_epochs_a_class_has_been_read_evenly(
    sampling: Sampling, labels: NDArray[np.int32], seed: int, epochs: int
) -> None:
    draw = weighted(labels, sampling, seed)
    times = np.zeros(len(labels), dtype=int)
    for epoch in range(epochs):
        times += np.bincount(draw.places(epoch), minlength=len(labels))
        for label in set(labels.tolist()):
            assert np.ptp(times[labels == label]) <= 1


def test_square_root_lies_between_balanced_and_natural() -> None:
    labels = np.repeat(np.arange(2, dtype=np.int32), [10, 1000])
    rare = [
        int((weighted(labels, sampling).places(0) < 10).sum())
        for sampling in ("square_root", "balanced")
    ]
    assert rare == [92, 505]  # 1010 * sqrt(10) / (sqrt(10) + sqrt(1000)) is 91.8


def test_which_samples_come_first_depends_on_the_seed() -> None:
    labels = np.repeat(np.arange(2, dtype=np.int32), [5, 100])
    first = {tuple(weighted(labels, seed=seed).places(0).tolist()) for seed in range(10)}
    assert len(first) == 10
    assert np.array_equal(weighted(labels).places(4), weighted(labels).places(4))


def test_places_are_those_of_the_subset() -> None:
    subset = np.array([3, 5, 8, 13], dtype=np.int64)
    labels = np.array([0, 1, 1, 1], dtype=np.int32)
    draw = Weighted(subset, labels, sampling="balanced", seed=0, name="labelled n=4")
    assert draw.name == "balanced labelled n=4"
    drawn = draw.places(0).tolist()
    assert drawn[:2] == [3, 3]
    assert len(set(drawn[2:])) == 2
    assert set(drawn[2:]) < {5, 8, 13}


# ----------------------------------------------------------------------------------- choose


@pytest.mark.parametrize("which", ["labelled", "unlabelled", "all"])
def test_samples_are_chosen_by_whether_they_have_a_label(which: Labels) -> None:
    labels = some_labels()
    wanted = {"labelled": labels >= 0, "unlabelled": labels == -1, "all": labels > -2}[which]
    found = choose(labels, classes=4, which=which)
    assert found.tolist() == [place for place in range(400) if wanted[place]]


@given(seed=st.integers(0, 2**40))
def test_n_per_class_are_chosen_and_subsets_are_nested(seed: int) -> None:
    labels = some_labels()
    smaller: set[int] = set()
    for count in (1, 2, 10, 40):
        found = choose(labels, classes=4, n_per_class=count, seed=seed)
        assert (np.diff(found) > 0).all()
        assert np.bincount(labels[found]).tolist() == [count] * 4
        assert smaller < set(found.tolist())
        smaller = set(found.tolist())


def test_the_choice_is_the_seeds_and_favours_no_place() -> None:
    labels = np.zeros(30, dtype=np.int32)
    times = np.zeros(30)
    for seed in range(3000):
        times[choose(labels, classes=1, n_per_class=3, seed=seed)] += 1
    # Expected 300 each; with 29 degrees of freedom 67 is p = 1e-4.
    assert ((times - 300) ** 2 / 300).sum() < 67


def test_a_class_that_is_too_small_is_refused() -> None:
    labels = np.array([0, 0, 0, 1, 1], dtype=np.int32)
    with pytest.raises(UsageError, match=r"n_per_class=3.* 1 of 2 .*index 1 has 2.* at most 2"):
        choose(labels, classes=2, n_per_class=3)
    with pytest.raises(UsageError, match=r"index 2 has 0\)\. Build more"):
        choose(labels, classes=3, n_per_class=1)


@pytest.mark.parametrize("which", ["unlabelled", "all"])
def test_n_per_class_counts_labelled_samples_only(which: Labels) -> None:
    with pytest.raises(UsageError, match="counts labelled samples"):
        choose(some_labels(), classes=4, which=which, n_per_class=1)


def test_a_choice_of_nothing_is_refused() -> None:
    without = np.full(3, -1, dtype=np.int32)
    with pytest.raises(UsageError, match="No sample has a label"):
        choose(without, classes=2)
    with pytest.raises(UsageError, match="Nothing in it is unlabelled"):
        choose(np.zeros(3, dtype=np.int32), classes=1, which="unlabelled")
    with pytest.raises(UsageError, match="This split is empty"):
        choose(without[:0], classes=2, which="all")


@given(labels=LABELS, most=st.integers(1, 9), seed=st.integers(0, 9))
def test_of_each_class_there_are_so_many_at_most(
    labels: NDArray[np.int32], most: int, seed: int
) -> None:
    places = np.flatnonzero(labels != 3)
    found = at_most(labels, places, most, seed)
    assert set(found) <= set(places)
    assert (np.diff(found) > 0).all()
    there, chosen = Counter(labels[places].tolist()), Counter(labels[found].tolist())
    assert chosen == {label: min(count, most) for label, count in there.items()}
    np.testing.assert_array_equal(found, at_most(labels, places, most, seed))
