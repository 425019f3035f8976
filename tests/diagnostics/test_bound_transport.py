"""Wasserstein distances against POT and scipy, and couplings that were given up early."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import ot
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from cmkd_scale.diagnostics.arrays import Floats, Integers
from cmkd_scale.diagnostics.bound_transport import Coupling, Line, pivots_within, transport


def solve(table: Floats, rows: Floats, columns: Floats, pivots: int = 10_000) -> Coupling:
    def cost(i: Integers, j: Integers) -> Floats:
        picked: Floats = table[i, j]
        return picked

    return transport(cost, rows, columns, pivots=pivots)


def masses(rng: np.random.Generator, size: int, kind: str) -> Floats:
    """Equal ones, whole shares of a small number, which tie, or any."""
    if kind == "equal":
        return np.full(size, 1.0 / size)
    weights = rng.integers(1, 4, size) if kind == "tied" else rng.random(size) + 1e-3
    return np.asarray(weights / weights.sum(), dtype=np.float64)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    kinds=st.tuples(*[st.sampled_from(["equal", "tied", "any"])] * 2),
    copies=st.booleans(),
)
def test_the_distance_is_the_one_of_pot(
    seed: int, n: int, k: int, kinds: tuple[str, str], copies: bool
) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(k, 2))
    if copies:  # equal samples: costs tie and vanish
        x, y = np.round(x), np.round(y)
    table = np.linalg.norm(x[:, None] - y[None], axis=2)
    a, b = masses(rng, n, kinds[0]), masses(rng, k, kinds[1])
    found = solve(table, a, b)
    assert found.is_optimal
    assert found.cost == pytest.approx(ot.emd2(a, b, table), abs=1e-9)


def test_one_that_is_given_up_costs_more_and_never_less() -> None:
    rng = np.random.default_rng(0)
    table = np.linalg.norm(rng.normal(size=(30, 1, 3)) - rng.normal(size=(1, 25, 3)), axis=2)
    a, b = masses(rng, 30, "equal"), masses(rng, 25, "any")
    best = float(ot.emd2(a, b, table))
    tried = [solve(table, a, b, pivots) for pivots in (0, 1, 5, 20, 60, 1000)]
    assert [coupling.is_optimal for coupling in tried] == [False] * 5 + [True]
    costs = [coupling.cost for coupling in tried]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(costs))
    assert costs[0] > 1.3 * best
    assert costs[-2] > costs[-1] == pytest.approx(best, abs=1e-9)


def test_more_points_than_the_simplex_takes_are_coupled_in_their_order() -> None:
    rng = np.random.default_rng(1)
    x, y = np.sort(rng.normal(size=400)), np.sort(rng.normal(size=300))
    table = np.abs(x[:, None] - y)
    a, b = masses(rng, 400, "tied"), masses(rng, 300, "any")
    found = solve(table, a, b)
    # In one dimension the order of the points is the best coupling, and is not known to be.
    assert found.cost == pytest.approx(wasserstein_distance(x, y, a, b), abs=1e-10)
    assert not found.is_optimal
    shuffled = rng.permutation(400)
    assert solve(table[shuffled], a[shuffled], b).cost > 2 * found.cost


def test_work_is_shared_by_what_a_pivot_touches() -> None:
    assert pivots_within(10**9, 10, 8, 100) > 10_000
    assert pivots_within(10**6, 300, 60, 10) < 10
    assert pivots_within(0, 5, 5, 5) == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 4), rounded=st.booleans())
def test_distances_on_the_line_are_those_of_scipy(seed: int, groups: int, rounded: bool) -> None:
    rng = np.random.default_rng(seed)
    mine = np.concatenate([np.arange(groups), rng.integers(0, groups, 20)])
    theirs = np.concatenate([np.arange(groups), rng.integers(0, groups, 12)])
    x, y = 10 * rng.random(len(mine)), 10 * rng.random(len(theirs))
    if rounded:
        x, y = np.round(x), np.round(y)
    a, b = rng.random(len(mine)) + 0.1, rng.random(len(theirs)) + 0.1
    a /= np.bincount(mine, a)[mine]
    b /= np.bincount(theirs, b)[theirs]
    line = Line.of(np.concatenate([x, y]), np.concatenate([mine, theirs]))
    terms = line.terms(np.stack([np.concatenate([a, -b])] * 2))
    owners = np.concatenate([mine, theirs])[line.order]
    found = np.bincount(owners, terms[1], minlength=groups)
    for group in range(groups):
        p, q = mine == group, theirs == group
        expected = wasserstein_distance(x[p], y[q], a[p], b[q])
        assert found[group] == pytest.approx(expected, abs=1e-10)
