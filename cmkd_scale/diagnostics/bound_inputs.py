"""What the error bound is computed from, and the losses of both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cmkd_scale.diagnostics.arrays import Floats, Integers
from cmkd_scale.diagnostics.bound_statistics import Measured
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.nearest import nearest

_ENTRIES = 2**22  # scores that are held at a time


@dataclass(frozen=True, slots=True)
class BoundInputs:
    """Held-out samples of a student beside its teacher; tensors, on the CPU or not.

    The teacher's side of every class is a distribution of points in its feature space: its own
    held-out samples where they are given, which is to be preferred; else the memory's prototypes
    by their masses. These are means of cells of what the teacher was trained on, so they lie
    nearer to the middle of their class than new samples, and the teacher term is too small.
    """

    features: Tensor
    """[N, D] of the student, in the teacher's space: behind the projector."""
    logits: Tensor
    """[N, C] of the student's own head; its cross-entropy is over all C classes."""
    labels: Tensor
    """[N] int64, all of them labels: 0 to C - 1."""
    prototypes: Tensor
    """[J, D]"""
    prototype_class: Tensor
    """[J] int64"""
    prototype_mass: Tensor
    """[J] share of the class."""
    head_weight: Tensor
    """[C, D] the teacher's head."""
    head_bias: Tensor
    """[C]"""
    known: Tensor
    """[C] bool: the classes that the teacher knows."""
    teacher_features: Tensor | None = None
    """[M, D] held-out samples of the teacher."""
    teacher_labels: Tensor | None = None
    """[M] int64"""
    class_risk: Tensor | None = None
    """[C] the teacher's cross-entropy on held-out samples of its own, NaN where there are none;
    printed beside the terms."""


def bound_inputs(
    memory: PrototypeMemory, features: Tensor, logits: Tensor, labels: Tensor
) -> BoundInputs:
    """Put a student's samples beside a memory in its classes (``align_to_student``).

    Args:
        memory: of the teacher.
        features: [N, D] in the memory's space.
        logits: [N, C] of the student's own head.
        labels: [N] int64
    """
    classes = len(memory.class_names)
    return BoundInputs(
        features=features,
        logits=logits,
        labels=labels,
        prototypes=memory.prototypes,
        prototype_class=memory.prototype_class,
        prototype_mass=memory.prototype_mass,
        head_weight=memory.head_weight,
        head_bias=memory.head_bias,
        known=torch.bincount(memory.prototype_class, minlength=classes) > 0,
        class_risk=memory.class_risk,
    )


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides in float64, n student samples and m teacher points of classes that both have."""

    measured: Measured
    features: Floats
    """[n, D]"""
    points: Floats
    """[m, D] of the teacher."""
    weight: Floats
    """[C, D] the teacher's head."""
    bias: Floats
    """[C]"""
    known: NDArray[np.bool_]
    """[C] classes that the head speaks of."""
    wrong: Floats
    """[n] 1 where the nearest prototype is of another class, 0 elsewhere."""
    left_out: int
    """Classes with student samples of which the teacher has no points."""


def sides_of(inputs: BoundInputs) -> Sides:
    """Compute the losses of both sides and leave out the classes that the teacher lacks.

    Raises:
        ValueError: a label is none of the C classes.
    """
    labels, known = _integers(inputs.labels), inputs.known.cpu().numpy().astype(np.bool_)
    classes = len(known)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    points, owners, mass = _teacher_points(inputs, known)
    kept = np.bincount(owners, minlength=classes)[labels] > 0
    rows = torch.from_numpy(kept).to(inputs.labels.device)
    features, weight, bias = inputs.features[rows], inputs.head_weight, inputs.head_bias
    own = functional.cross_entropy(
        inputs.logits[rows].double(), inputs.labels[rows], reduction="none"
    )
    return Sides(
        Measured(
            own=_floats(own),
            by_class=_losses(_floats(features), _floats(weight), _floats(bias), known),
            labels=labels[kept],
            teacher=_own_losses(points, owners, _floats(weight), _floats(bias), known),
            teacher_class=owners,
            teacher_mass=mass,
            teacher_is_sampled=inputs.teacher_features is not None,
        ),
        features=_floats(features),
        points=points,
        weight=_floats(weight),
        bias=_floats(bias),
        known=known,
        wrong=_wrong(inputs, features, inputs.labels[rows]),
        left_out=len(np.unique(labels[~kept])),
    )


def _teacher_points(
    inputs: BoundInputs, known: NDArray[np.bool_]
) -> tuple[Floats, Integers, Floats]:
    """The teacher's points [m, D], their classes [m] and masses [m], of sum 1 in each class."""
    if (inputs.teacher_features is None) != (inputs.teacher_labels is None):
        raise ValueError("teacher_features and teacher_labels are given together or not at all")
    if inputs.teacher_features is not None and inputs.teacher_labels is not None:
        points, owners = _floats(inputs.teacher_features), _integers(inputs.teacher_labels)
        mass = np.ones(len(owners))
    else:
        points, owners = _floats(inputs.prototypes), _integers(inputs.prototype_class)
        mass = _floats(inputs.prototype_mass)
    taken = known[owners] & (mass > 0)
    points, owners, mass = points[taken], owners[taken], mass[taken]
    return points, owners, mass / np.bincount(owners, mass, minlength=len(known))[owners]


def _losses(features: Floats, weight: Floats, bias: Floats, known: NDArray[np.bool_]) -> Floats:
    """[n, C] ``-log p_T(c | z)`` over the known classes, infinite for the others."""
    scores = np.where(known, features @ weight.T + bias, -np.inf)
    highest = scores.max(axis=1, keepdims=True)
    # Rounding may leave a loss below 0, where phi is steeper than what is proved.
    normaliser = highest + np.log(np.exp(scores - highest).sum(axis=1, keepdims=True))
    losses: Floats = np.maximum(normaliser - scores, 0.0)
    return losses


def _own_losses(
    points: Floats, owners: Integers, weight: Floats, bias: Floats, known: NDArray[np.bool_]
) -> Floats:
    """[m] the loss of each point for its own class."""
    losses, size = np.zeros(len(points)), max(1, _ENTRIES // len(known))
    for first in range(0, len(points), size):
        part = slice(first, first + size)
        by_class = _losses(points[part], weight, bias, known)
        losses[part] = by_class[np.arange(len(by_class)), owners[part]]
    return losses


def _wrong(inputs: BoundInputs, features: Tensor, labels: Tensor) -> Floats:
    if not len(labels):
        return np.zeros(0)
    _, ids = nearest(inputs.prototypes, features, 1)
    return (inputs.prototype_class[ids[:, 0]] != labels).double().cpu().numpy()


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().double().cpu().numpy()
    return values


def _integers(tensor: Tensor) -> Integers:
    values: Integers = tensor.detach().long().cpu().numpy()
    return values
