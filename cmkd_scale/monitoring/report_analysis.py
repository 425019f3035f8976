"""What the report computes from arrays: confusions, groups of labels, a map in two dimensions.

Shapes: N test samples, C classes, D feature width, J prototypes, G groups of labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cmkd_scale.errors import IntegrityError

_OWN_GROUP = 20
"""Up to so many classes each one is a group of its own."""


@dataclass(frozen=True)
class Predictions:
    """Test predictions of a run, labelled samples only."""

    label_names: tuple[str, ...]
    labels: NDArray[np.int64]
    """[N]"""
    predictions: NDArray[np.int64]
    """[N]"""
    features: NDArray[np.float32]
    """[N, D]"""


@dataclass(frozen=True)
class Prototypes:
    """The part of a prototype memory that can be drawn."""

    class_names: tuple[str, ...]
    prototypes: NDArray[np.float32]
    """[J, D]"""
    prototype_class: NDArray[np.int64]
    """[J]"""
    class_count: NDArray[np.int64]
    """[C] samples of the teacher's."""


def read_predictions(file: Path) -> Predictions | None:
    """Read ``predictions.safetensors``; None if there is no such file.

    Raises:
        IntegrityError: it is damaged, or its shapes and classes contradict each other.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="np") as archive:
            names = _names((archive.metadata() or {})["label_names"])
            labels = archive.get_tensor("labels")
            predictions = archive.get_tensor("predictions")
            features = archive.get_tensor("features")
        if not (labels.ndim == 1 and features.ndim == 2 and len(features) == len(labels)):
            raise ValueError(f"shapes {labels.shape} and {features.shape} do not fit")
        known = labels >= 0
        labels, predictions, features = labels[known], predictions[known], features[known]
        _check_classes(labels, len(labels), names)
        _check_classes(predictions, len(labels), names)
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise IntegrityError(
            f"{file} is damaged ({error}); run `cmkd evaluate` on this run again."
        ) from None
    return Predictions(names, labels, predictions, features)


def read_prototypes(file: Path) -> Prototypes:
    """Read what can be drawn of a ``memory.safetensors``.

    Raises:
        IntegrityError: it is damaged, or its shapes and classes contradict each other.
    """
    try:
        with safe_open(str(file), framework="np") as archive:
            names = _names((archive.metadata() or {})["class_names"])
            prototypes = archive.get_tensor("prototypes")
            classes = archive.get_tensor("prototype_class")
            counts = archive.get_tensor("class_count")
        if prototypes.ndim != 2 or counts.shape != (len(names),):
            raise ValueError(f"shapes {prototypes.shape} and {counts.shape} do not fit")
        _check_classes(classes, len(prototypes), names)
    except (SafetensorError, KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise IntegrityError(
            f"{file} is damaged ({error}); build it again with `cmkd memory`."
        ) from None
    return Prototypes(names, prototypes, classes, counts)


def _names(text: str) -> tuple[str, ...]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the names of the classes are not a list of strings")
    return tuple(names)


def _check_classes(classes: NDArray[np.int64], size: int, names: Sequence[str]) -> None:
    """Refuse indices that are not ``size`` classes among ``names``."""
    if classes.shape != (size,):
        raise ValueError(f"{classes.shape} class indices for {size} samples")
    if size and not 0 <= int(classes.min()) <= int(classes.max()) < len(names):
        raise ValueError(f"a class index is outside the {len(names)} names")


def confusion_counts(runs: Sequence[Predictions]) -> NDArray[np.int64]:
    """Count [C, C] true class by predicted class over runs with the same label names."""
    classes = len(runs[0].label_names)
    counts = np.zeros(classes * classes, dtype=np.int64)
    for run in runs:
        counts += np.bincount(run.labels * classes + run.predictions, minlength=classes * classes)
    return counts.reshape(classes, classes)


def hardest_pairs(counts: NDArray[np.int64], limit: int) -> list[tuple[int, int, int, float]]:
    """Return the most frequent confusions: true class, predicted class, count, share of class."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if count := int(wrong[true, predicted]):
            share = count / int(counts[true].sum())
            pairs.append((int(true), int(predicted), count, share))
    return pairs


def label_groups(names: Sequence[str]) -> list[str]:
    """Return the group [C] of each class for colouring.

    A class is its own group up to 20 classes; beyond, classes are grouped by their first
    character after what all names have in common, e.g. ``42`` and ``47`` in ``4…``.
    """
    if len(names) <= _OWN_GROUP:
        return list(names)
    common = os.path.commonprefix(list(names))  # noqa: RUF071 - characters are what is meant
    return [f"{name[: len(common) + 1]}…" for name in names]


@dataclass(frozen=True)
class Plane:
    """The plane of the two principal components of prototypes."""

    prototypes: NDArray[np.float64]
    """[J, 2]"""
    features: NDArray[np.float64]
    """[N, 2]"""
    variance_share: tuple[float, float]
    """Share of the prototypes' variance along each axis."""


def project(prototypes: NDArray[np.float32], features: NDArray[np.float32]) -> Plane | None:
    """Fit a plane to prototypes [J, D] by PCA and project features [N, D] into it.

    The sign of an axis is fixed by its largest coordinate, so that equal runs give equal
    pictures. None where there is no plane: other widths, or fewer than three prototypes.
    """
    if prototypes.shape[1] != features.shape[1] or min(len(prototypes) - 1, features.shape[1]) < 2:
        return None
    mean = prototypes.mean(axis=0, dtype=np.float64)
    centred = prototypes.astype(np.float64) - mean
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    plane = axes[:2]
    largest = np.abs(plane).argmax(axis=1)
    plane = plane * np.sign(plane[[0, 1], largest])[:, None]
    variance = singular**2 / max(float((singular**2).sum()), np.finfo(float).tiny)
    return Plane(
        prototypes=centred @ plane.T,
        features=(features - mean) @ plane.T,
        variance_share=(float(variance[0]), float(variance[1])),
    )
