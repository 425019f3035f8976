"""How far the terms of the error bound can be trusted: intervals, a null, a noise floor.

Shapes: n student samples, m teacher points, C classes, S draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmkd_scale.diagnostics.arrays import Floats, Integers
from cmkd_scale.diagnostics.bound_transport import Line

_ENTRIES = 2**22  # weights that are held at a time
_SPLITS = 100  # of the teacher's points into halves, for the noise floor
_COVERED = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class Measured:
    """Losses of both sides in nats; of classes alone that both sides have points of."""

    own: Floats
    """[n] the student's own cross-entropy."""
    by_class: Floats
    """[n, C] ``-log p_T(c | z)`` of every class c; infinite for those the teacher lacks."""
    labels: Integers
    """[n]"""
    teacher: Floats
    """[m] the teacher's cross-entropy on its own points, for their own class."""
    teacher_class: Integers
    """[m]"""
    teacher_mass: Floats
    """[m] adds up to 1 in each class."""
    teacher_is_sampled: bool
    """Whether its points are samples, and not prototypes."""

    @property
    def crossed(self) -> Floats:
        """[n] the teacher's cross-entropy on the student's samples."""
        picked: Floats = self.by_class[np.arange(len(self.labels)), self.labels]
        return picked

    @property
    def share(self) -> Floats:
        """[C] the student's class frequencies."""
        counts = np.bincount(self.labels, minlength=self.by_class.shape[1])
        return counts / len(self.labels)

    @property
    def teacher_weight(self) -> Floats:
        """[m] mass of the teacher's points under the student's class frequencies."""
        weights: Floats = self.share[self.teacher_class] * self.teacher_mass
        return weights


def confident(loss: Floats) -> Floats:
    """``kappa l = l e^-l``: what a loss counts, weighted by the probability of the true class."""
    return loss * np.exp(-loss)


def intervals(measured: Measured, seed: int, draws: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the terms, class frequencies kept as they are.

    Student samples are drawn again with replacement within their class, and so are the teacher's
    where they are samples; prototypes are taken as given, which leaves A without spread. The
    intervals are the basic ones of Davison and Hinkley (1997, section 5.2), ``2 v - q``: a
    distance between samples is larger than that of what they were drawn from, and larger still
    between samples of samples, which reflection at the value takes off. That of U3 may for this
    reason lie below its value where classes have few samples; a class with one has no spread.
    """
    line = Line.of(
        np.concatenate([measured.crossed, measured.teacher]),
        np.concatenate([measured.labels, measured.teacher_class]),
    )
    n, m = len(measured.labels), len(measured.teacher)
    point = _terms(measured, line, np.full((1, n), 1.0 / n), measured.teacher_weight[None])
    size = max(1, _ENTRIES // (n + m))
    students = _resample(measured.labels, np.random.default_rng([seed, 0]), draws, size)
    teachers = _resample(measured.teacher_class, np.random.default_rng([seed, 1]), draws, size)
    parts = []
    for counts in students:
        weights = measured.teacher_weight
        if measured.teacher_is_sampled:
            weights = weights * next(teachers)
        parts.append(_terms(measured, line, counts / n, np.broadcast_to(weights, (len(counts), m))))
    found = {}
    for name, [value] in point.items():
        low, high = np.quantile(np.concatenate([part[name] for part in parts]), _COVERED)
        found[name] = (float(2 * value - high), float(2 * value - low))
    found["U3"] = (max(0.0, found["U3"][0]), max(0.0, found["U3"][1]))
    return found


def _terms(measured: Measured, line: Line, w: Floats, v: Floats) -> dict[str, Floats]:
    """Each term [S] under weights w [S, n] of the student and v [S, m] of the teacher."""
    risk, crossed = w @ measured.own, w @ confident(measured.crossed)
    teacher = v @ confident(measured.teacher)
    return {
        "risk": risk,
        "teacher_term": teacher,
        "label_gap": risk - crossed,
        "transfer_gap": crossed - teacher,
        "teacher_cross_entropy": w @ measured.crossed,
        "U3": line.terms(np.concatenate([w, -v], axis=1)).sum(axis=1),
    }


def _resample(
    groups: Integers, generator: np.random.Generator, draws: int, size: int
) -> Iterator[Floats]:
    """How often each of the points [n] is drawn, within its group; [size, n] at a time."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], groups[order])
    sizes = np.searchsorted(groups[order], groups[order], side="right") - starts
    n = len(groups)
    for first in range(0, draws, size):
        rows = min(size, draws - first)
        picks = order[starts + (generator.random((rows, n)) * sizes).astype(np.int64)]
        flat = (picks + n * np.arange(rows)[:, None]).ravel()
        yield np.bincount(flat, minlength=rows * n).reshape(rows, n).astype(np.float64)


def permutation_null(measured: Measured, seed: int, permutations: int) -> dict[str, Any]:
    """D and U3 against a teacher whose classes are permuted: head and points take other names.

    Every draw is what the report would say of the same student beside that teacher, as of the
    control ``permuted``. ``p_value`` is the probability of a U3 as small as the real one, if the
    names of the teacher's classes meant nothing: ``(1 + smaller) / (1 + permutations)``.
    """
    generator = np.random.default_rng([seed, 2])
    known = np.unique(measured.teacher_class)
    label_of = np.zeros(measured.by_class.shape[1], dtype=np.int64)
    class_of = label_of.copy()
    rows = np.arange(len(measured.labels))
    gaps, distances = [], []
    for permuted in (known, *(generator.permutation(known) for _ in range(permutations))):
        class_of[known], label_of[permuted] = permuted, known
        crossed = measured.by_class[rows, class_of[measured.labels]]
        names = label_of[measured.teacher_class]
        weights = measured.share[names] * measured.teacher_mass
        line = Line.of(
            np.concatenate([crossed, measured.teacher]), np.concatenate([measured.labels, names])
        )
        apart = np.concatenate([np.full(len(rows), 1.0 / len(rows)), -weights])
        distances.append(line.terms(apart).sum())
        gaps.append(confident(crossed).mean() - weights @ confident(measured.teacher))
    smaller = int(np.sum(np.array(distances[1:]) <= distances[0] + 1e-12))
    return {
        "transfer_gap": _spread(np.array(gaps[1:])),
        "U3": _spread(np.array(distances[1:])),
        "p_value": (1 + smaller) / (1 + permutations),
        "permutations": permutations,
    }


def noise_floor(measured: Measured, seed: int) -> dict[str, float] | None:
    """U3 between two halves of the teacher's own points, over random halves.

    A U3 no larger than this says nothing against the student. Prototypes of a class differ by
    design, so that their halves lie further apart than halves of its samples would. Classes with
    one point are left out; None if there are no others.
    """
    classes = measured.teacher_class
    several = np.bincount(classes, minlength=len(measured.share))[classes] > 1
    weight = measured.teacher_weight[several]
    if weight.sum() == 0:
        return None
    weight, classes = weight / weight.sum(), classes[several]
    generator = np.random.default_rng([seed, 3])
    # Class and a random number below 1 sort the points by class, at random within it.
    order = np.argsort(classes + generator.random((_SPLITS, len(classes))), axis=1)
    by_class = np.sort(classes)
    starts = np.searchsorted(by_class, by_class)
    sizes = np.searchsorted(by_class, by_class, side="right") - starts
    first = np.zeros(order.shape)
    in_first = np.arange(len(classes)) - starts < sizes // 2
    np.put_along_axis(first, order, np.broadcast_to(in_first, order.shape).astype(float), axis=1)
    total = np.bincount(classes, weight)[classes]
    signed = []
    for half in (first, 1.0 - first):
        mass = np.stack([np.bincount(classes, row)[classes] for row in half * weight])
        signed.append(
            half * weight * np.divide(total, mass, where=mass > 0, out=np.zeros_like(mass))
        )
    line = Line.of(measured.teacher[several], classes)
    return _spread(line.terms(signed[0] - signed[1]).sum(axis=1))


def _spread(values: Floats) -> dict[str, float]:
    """Mean of draws, and between what values 95 % of them lie."""
    low, high = np.quantile(values, _COVERED)
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
