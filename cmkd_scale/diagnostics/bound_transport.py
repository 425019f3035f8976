"""Wasserstein-1 distances between two weighted sets of points, never too small.

In one dimension the distance is an integral over sorted values. Between vectors it is the
optimum of a linear programme, which the transport simplex solves here; every coupling that it
passes on the way costs at least the optimum, so that one stopped early is still an upper bound.

Letters: n points on one side, k on the other, m all points, S sets of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cmkd_scale.diagnostics.arrays import Floats, Integers

Cost = Callable[[Integers, Integers], Floats]
"""Distances between points of the one side and points of the other, by their numbers."""

_MOST_POINTS = 512  # of both sides: the simplex holds a matrix of their number squared
_HAIR = 1e-12  # mass that keeps sums of masses from being equal
_OVERHEAD = 40_000  # entries that could be touched while the calls of one pivot are made


class Line(NamedTuple):
    """Points of several groups on the real line, sorted for any number of weights."""

    order: Integers
    """[m] by group, then by value."""
    gaps: Floats
    """[m] to the next point of the group; 0 after its last."""

    @staticmethod
    def of(values: Floats, groups: Integers) -> Line:
        """Sort values [m], each of a group [m]."""
        order = np.lexsort((values, groups))
        gaps = np.append(np.diff(values[order]), 0.0)
        gaps[np.append(np.diff(groups[order]) != 0, True)] = 0.0
        return Line(order, gaps)

    def terms(self, weights: Floats) -> Floats:
        """``|F - G|`` times the gap to the next point, whose sum over a group is its distance.

        Args:
            weights: [..., m] positive for points of the one side, negative for those of the
                other; they add up to 0 in every group.

        Returns:
            [..., m] in the order of ``order``.
        """
        # Each group ends at 0, so one running sum serves all of them.
        return np.abs(np.cumsum(weights[..., self.order], axis=-1)) * self.gaps


class Coupling(NamedTuple):
    """The cost of a coupling, at least the distance."""

    cost: float
    is_optimal: bool
    """Whether it is the distance."""


def pivots_within(entries: int, n: int, k: int, width: int) -> int:
    """How many pivots of the simplex touch so many entries, once it has its table of distances.

    Args:
        entries: of the simplex's matrices and of the vectors, which are read three times.
        n: points on one side.
        k: points on the other.
        width: of the vectors.
    """
    left = entries - 3 * n * k * width
    return max(0, left) // (_OVERHEAD + (n + k) ** 2 + n * k)


def transport(cost: Cost, rows: Floats, columns: Floats, *, pivots: int) -> Coupling:
    """Least cost of moving masses ``rows`` [n] to ``columns`` [k], both positive with sum 1.

    The transport simplex (Dantzig 1951): a basis of n + k - 1 cells is a spanning tree, its
    inverse has entries -1, 0 and 1 only, so no rounding gathers in it. Masses that are told apart
    by a hair (Orden 1956) make every step an improvement, so that it cannot run in circles; the
    cost is that of the true masses. It begins with the coupling that is monotone in the order in
    which the points are given. A pivot takes O((n + k)^2), and some n + k to 5 (n + k) are needed.

    Args:
        cost: distance between points.
        rows: [n]
        columns: [k]
        pivots: at most so many; none for more than 512 points.
    """
    apart = rows + _HAIR
    cells = _staircase(apart, np.append(columns[:-1], columns[-1] + _HAIR * len(rows)))
    if len(rows) + len(columns) > _MOST_POINTS or pivots == 0:
        exact = _staircase(rows, columns)
        return Coupling(float(cost(*exact.cells) @ exact.flow), min(len(rows), len(columns)) == 1)
    table = cost(*np.indices((len(rows), len(columns))).reshape(2, -1))
    return _simplex(table.reshape(len(rows), -1), rows, columns, cells, pivots)


class _Flow(NamedTuple):
    cells: tuple[Integers, Integers]
    """[n + k - 1] rows and columns between which mass moves."""
    flow: Floats
    """[n + k - 1]"""


def _staircase(rows: Floats, columns: Floats) -> _Flow:
    """The monotone coupling: both sides' masses laid along one line and cut at all borders."""
    first, second = np.cumsum(rows), np.cumsum(columns)
    edges = np.sort(np.concatenate([first, second[:-1]]))
    starts = np.append(0.0, edges[:-1])
    middles = (starts + edges) / 2
    row = np.minimum(np.searchsorted(first, middles), len(rows) - 1)
    column = np.minimum(np.searchsorted(second, middles), len(columns) - 1)
    return _Flow((row, column), edges - starts)


def _simplex(cost: Floats, rows: Floats, columns: Floats, start: _Flow, pivots: int) -> Coupling:
    """Improve a basis of the costs [n, k] until none is better, or the pivots are used up."""
    n, size = len(rows), len(rows) + len(columns) - 1
    row, column = start.cells[0].copy(), start.cells[1].copy()
    # The last column's equation follows from the others.
    basis = np.zeros((size + 1, size))
    basis[row, np.arange(size)] = 1.0
    basis[n + column, np.arange(size)] = 1.0
    inverse = np.rint(np.linalg.inv(basis[:-1]))
    masses = np.concatenate([rows, columns[:-1]])
    apart = masses + np.append(np.full(n, _HAIR), np.zeros(size - n))
    flow, optimal = inverse @ apart, False
    for pivot in range(pivots + 1):
        duals = np.append(cost[row, column] @ inverse, 0.0)
        reduced = cost - duals[:n, None] - duals[n:]
        i, j = divmod(int(reduced.argmin()), len(columns))
        optimal = bool(reduced[i, j] >= -1e-11 * cost.max())
        if optimal or pivot == pivots:
            break
        change = inverse[:, i] + (inverse[:, n + j] if n + j < size else 0.0)
        leaves = int(np.where(change > 0.5, flow, np.inf).argmin())
        entering = inverse[leaves].copy()
        inverse -= np.outer(change, entering)
        inverse[leaves] = entering
        row[leaves], column[leaves] = i, j
        flow = inverse @ apart
    moved = np.maximum(inverse @ masses, 0.0)
    return Coupling(float(cost[row, column] @ moved), optimal)
