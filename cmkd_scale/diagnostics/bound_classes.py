"""The terms of the error bound and what bounds them, class by class.

Letters: n student samples and m teacher points of all classes or, where it says so, of one.
"""

from __future__ import annotations

import numpy as np

from cmkd_scale.diagnostics.arrays import Floats, Integers
from cmkd_scale.diagnostics.bound_inputs import Sides
from cmkd_scale.diagnostics.bound_statistics import confident
from cmkd_scale.diagnostics.bound_transport import Line, pivots_within, transport

LIPSCHITZ = 0.1354141384
"""c*, rounded up: of kappa l_T in the sup norm of the margins; see ``bound``."""

_WORK = 10**9  # entries that may be touched for each of U1 and U2, all classes together: a second
_ENTRIES = 2**20  # coordinates of differences that are held at a time


def class_table(sides: Sides) -> tuple[dict[str, Floats], dict[str, int]]:
    """The columns [C] of the table by class, 0 without samples, and how many are exact.

    The second tells for U1 and U2 in how many of the classes the distance is exact; elsewhere it
    is the cost of a coupling, so too large.
    """
    measured = sides.measured
    share = measured.share
    crossed = measured.crossed
    risk = _means(sides, measured.own)
    transferred = _means(sides, confident(crossed))
    present = share > 0
    weights = measured.teacher_mass * confident(measured.teacher)
    term = np.where(present, _sums(measured.teacher_class, weights, len(share)), 0.0)
    table: dict[str, Floats] = {
        "share": share,
        "risk": risk,
        "teacher_term": term,
        "label_gap": risk - transferred,
        "transfer_gap": transferred - term,
        "teacher_cross_entropy": _means(sides, crossed),
        "wrong_class_mass": _means(sides, sides.wrong),
        "U1": np.zeros(len(share)),
        "U2": np.zeros(len(share)),
        "U3": _on_the_line(sides),
    }
    exact = {"U1": 0, "U2": 0}
    work = _WORK // int(present.sum())
    for label in np.flatnonzero(present):
        for name, (value, is_exact) in _between_vectors(sides, int(label), work).items():
            table[name][label] = value
            exact[name] += is_exact
    return table, exact


def _means(sides: Sides, values: Floats) -> Floats:
    """[C] mean of the values [n] of each class."""
    labels, classes = sides.measured.labels, len(sides.known)
    counts = np.bincount(labels, minlength=classes)
    return _sums(labels, values, classes) / np.maximum(counts, 1)


def _sums(groups: Integers, values: Floats, classes: int) -> Floats:
    return np.bincount(groups, values, minlength=classes).astype(np.float64)


def _on_the_line(sides: Sides) -> Floats:
    """[C] Wasserstein-1 distance of the teacher's losses in each class."""
    measured = sides.measured
    counts = np.bincount(measured.labels, minlength=len(sides.known))
    groups = np.concatenate([measured.labels, measured.teacher_class])
    line = Line.of(np.concatenate([measured.crossed, measured.teacher]), groups)
    mass = measured.teacher_mass * (counts[measured.teacher_class] > 0)
    terms = line.terms(np.concatenate([1.0 / counts[measured.labels], -mass]))
    return _sums(groups[line.order], terms, len(counts))


def _between_vectors(sides: Sides, label: int, work: int) -> dict[str, tuple[float, bool]]:
    """U1 and U2 of a class, and whether the distance in it is exact."""
    measured = sides.measured
    mine, theirs = measured.labels == label, measured.teacher_class == label
    # In the order of the loss, so that the coupling to begin with is a sensible one.
    first = np.flatnonzero(mine)[np.argsort(measured.crossed[mine], kind="stable")]
    second = np.flatnonzero(theirs)[np.argsort(measured.teacher[theirs], kind="stable")]
    z, t = sides.features[first], sides.points[second]
    # Rows of w_y - w_j, whose products with features are the margins; 0 for y itself.
    apart = sides.weight[label] - sides.weight[sides.known]
    offset = sides.bias[label] - sides.bias[sides.known]
    steepest = float(np.linalg.norm(apart, axis=1).max())
    rows, columns = np.full(len(first), 1.0 / len(first)), measured.teacher_mass[second]

    def feature_distance(i: Integers, k: Integers) -> Floats:
        return _distances(z, t, i, k, order=2)

    margins = z @ apart.T + offset, t @ apart.T + offset

    def margin_distance(i: Integers, k: Integers) -> Floats:
        return _distances(*margins, i, k, order=np.inf)

    found = {}
    for name, constant, cost, width in (
        ("U1", LIPSCHITZ * steepest, feature_distance, z.shape[1]),
        ("U2", LIPSCHITZ, margin_distance, len(apart)),
    ):
        pivots = pivots_within(work, len(first), len(second), width)
        coupling = transport(cost, rows, columns, pivots=pivots)
        found[name] = (constant * coupling.cost, coupling.is_optimal)
    return found


def _distances(x: Floats, y: Floats, i: Integers, k: Integers, *, order: float) -> Floats:
    """Norms of x[i] - y[k], some pairs at a time."""
    size = max(1, _ENTRIES // x.shape[1])
    parts = [
        np.linalg.norm(x[i[at : at + size]] - y[k[at : at + size]], ord=order, axis=1)
        for at in range(0, len(i), size)
    ]
    return np.concatenate(parts)
