"""What a teacher's soft labels are worth on held-out samples: two heads tried on one student.

Training a student with a teacher costs a run; training a linear head on the features of a student
that has not met it costs less than a minute. One head learns from labels (with smoothing) alone,
the other from the teacher's soft labels beside them, as in distillation (Hinton et al. 2015). How
much better the second one is on samples that neither has seen says whether the teacher's class
structure helps here. That takes in at once whether the structure is right, how much of it there
is, and how much is left to learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from cmkd_scale.diagnostics.arrays import Floats, Integers

SMOOTHING = 0.1
DECAYS = (3e-4, 1e-3, 1e-2)
"""Squared weights are held small by one of these each time; the gain is the mean over them, so that
it is no matter of the one that happens to suit the labels alone."""
SHARES = (0.5, 1.0, 2.0)
"""Weights of the soft labels beside the labels; likewise."""
_ITERATIONS = 80


@dataclass(frozen=True, slots=True)
class Samples:
    """Features of a student with their labels."""

    features: Floats
    """[n, D]"""
    labels: Integers
    """[n] classes 0 to C - 1."""

    def of(self, classes: Integers) -> Samples:
        """Those of ``classes``, ascending, which are numbered 0, 1, ... from then on."""
        chosen = np.isin(self.labels, classes)
        return Samples(self.features[chosen], np.searchsorted(classes, self.labels[chosen]))


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it, in accuracy of 0 to 1 on the held-out samples."""

    gain: float
    """Of heads with the teacher's soft labels over those without, mean over ``DECAYS`` and
    ``SHARES``."""
    error: float
    """Its standard error, of paired samples."""
    accuracy: float
    """Of heads without."""


def try_heads(
    train: Samples, held_out: Samples, soft_labels: Floats, temperature: float
) -> Trial | None:
    """Train heads with and without a teacher's soft labels, and compare them.

    Args:
        train: labelled samples that the student was trained on.
        held_out: samples that it was not trained on.
        soft_labels: [C, C] the teacher's mean probabilities at ``temperature`` for samples of each
            class, rows that sum to 1.
        temperature: T; the divergence counts T^2 times, as in training.

    Returns:
        None without samples of either kind.
    """
    if not len(train.labels) or not len(held_out.labels):
        return None
    centre, scale = train.features.mean(0), max(float(train.features.std()), 1e-12)
    inputs, others = ((part.features - centre) / scale for part in (train, held_out))
    classes = len(soft_labels)
    hard = np.full((len(train.labels), classes), SMOOTHING / classes)
    hard[np.arange(len(train.labels)), train.labels] += 1.0 - SMOOTHING
    soft = soft_labels[train.labels]

    def right(share: float, decay: float) -> Floats:
        weight, bias = _fit(inputs, hard, soft, share, temperature, decay)
        predicted = (others @ weight + bias).argmax(1)
        return np.asarray(predicted == held_out.labels, np.float64)

    plain = [right(0.0, decay) for decay in DECAYS]
    gains = np.mean(
        [
            right(share, decay) - without
            for decay, without in zip(DECAYS, plain, strict=True)
            for share in SHARES
        ],
        axis=0,
    )
    return Trial(
        gain=float(gains.mean()),
        error=float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else 1.0,
        accuracy=float(np.mean(plain)),
    )


def _fit(
    inputs: Floats, hard: Floats, soft: Floats, share: float, temperature: float, decay: float
) -> tuple[Floats, Floats]:
    """Weight [D, C] and bias [C] of the head that minimises

    ``CE(hard, z) + share T^2 CE(soft, z / T) + decay |weight|^2``, with z = inputs weight + bias.
    """
    (count, width), classes = inputs.shape, hard.shape[1]

    def objective(flat: Floats) -> tuple[float, Floats]:
        weight, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        scores = inputs @ weight + bias
        log_p = log_softmax(scores, axis=1)
        loss = -float(np.vdot(hard, log_p)) / count + decay * float(np.vdot(weight, weight))
        slope = np.exp(log_p) - hard
        if share:
            log_p = log_softmax(scores / temperature, axis=1)
            loss -= share * temperature**2 * float(np.vdot(soft, log_p)) / count
            slope += share * temperature * (np.exp(log_p) - soft)
        slope /= count
        down = inputs.T @ slope + 2.0 * decay * weight
        return loss, np.concatenate([down.reshape(-1), slope.sum(0)])

    start = np.zeros((width + 1) * classes)
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}
    ).x
    return found[: width * classes].reshape(width, classes), found[width * classes :]
