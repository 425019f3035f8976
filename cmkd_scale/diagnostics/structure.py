"""Do two modalities tell the same classes apart? Agreement of class structures, and its null.

A teacher can teach a student of another modality that numbers sharing a digit are alike only if
that holds in the student's modality, too. Both networks say how alike two classes are by the
distance of their mean features; as features of two modalities share no space, only the ranking of
a class's neighbours is compared (representational similarity analysis, Kriegeskorte et al. 2008).
The null are classes that are named at random (Mantel 1967).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmkd_scale.diagnostics.arrays import Floats, Integers

LEAST_CLASSES = 5
"""With fewer classes, hardly any agreement could be told from chance."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two class structures agree."""

    correlation: float
    """Mean over classes of Spearman's correlation between the two rankings of the others, -1 to
    1."""
    z: float
    """The same in standard deviations of its null, from the null's mean."""
    p: float
    """Part of the null that is as large, (k + 1) / (n + 1) of n random namings."""
    classes: int
    """That were compared."""


def class_means(sums: Floats, counts: Integers) -> Floats:
    """[C, D] mean features from sums [C, D] and counts [C]; NaN for classes without samples."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums / counts[:, None])


def structure_agreement(
    student_means: Floats,
    teacher_means: Floats,
    *,
    permutations: int = 499,
    most_classes: int = 1000,
    seed: int = 0,
) -> Agreement | None:
    """Compare which classes are alike for a student and for a teacher.

    Args:
        student_means: [C, D] mean feature of each class; NaN where there is none.
        teacher_means: [C, E] the teacher's, of the same classes.
        permutations: random namings for the null.
        most_classes: of more, so many are drawn: cost and memory grow with their square.
        seed: of all draws.

    Returns:
        The agreement over the classes that both have, or None below ``LEAST_CLASSES``.
    """
    rng = np.random.default_rng(seed)
    both = np.flatnonzero(np.isfinite(student_means).all(1) & np.isfinite(teacher_means).all(1))
    if len(both) > most_classes:
        both = np.sort(rng.choice(both, most_classes, replace=False))
    if len(both) < LEAST_CLASSES:
        return None
    ours = _standardised_ranks(_distances(student_means[both]))
    theirs = _standardised_ranks(_distances(teacher_means[both]))
    count = len(both)

    def correlation(names: Integers) -> float:
        return float(np.vdot(ours, theirs[np.ix_(names, names)])) / count

    found = correlation(np.arange(count))
    null = np.array([correlation(rng.permutation(count)) for _ in range(permutations)])
    spread = max(float(null.std()), 1e-12)
    return Agreement(
        correlation=found,
        z=(found - float(null.mean())) / spread,
        p=(1 + int((null >= found).sum())) / (1 + permutations),
        classes=count,
    )


def _distances(means: Floats) -> Floats:
    """[C, C] Euclidean."""
    # Centred, since products of features far from the origin cancel.
    centred = means - means.mean(0)
    square = (centred**2).sum(1)
    between = square[:, None] + square[None] - 2 * centred @ centred.T
    return np.asarray(np.sqrt(np.maximum(between, 0.0)))


def _standardised_ranks(distances: Floats) -> Floats:
    """[C, C] ranks of each row's others, with mean 0 and norm 1 in a row; 0 on the diagonal.

    A row whose others are all equally far says nothing and becomes 0.
    """
    count = len(distances)
    others = distances[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    # Rounding must not rank what is equal: orthogonal prototypes are all as far from each other.
    resolution = 1e-6 * max(float(others.max()), 1e-300)
    from scipy.stats import rankdata  # takes half a second, which few stages need

    ranks = rankdata(np.round(others / resolution), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    ranks /= np.maximum(np.linalg.norm(ranks, axis=1, keepdims=True), 1e-300)
    out = np.zeros_like(distances)
    out[~np.eye(count, dtype=bool)] = ranks.reshape(-1)
    return out
