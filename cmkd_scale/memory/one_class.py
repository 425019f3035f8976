"""What the memory says of one class: prototypes, soft labels, moments, covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.covariance import low_rank_factor, within_variance
from cmkd_scale.memory.kmeans import Clusters, cluster, lloyd_step, prototype_count
from cmkd_scale.memory.soft_labels import (
    MOST_LISTED,
    SoftLabels,
    compress,
    head_says,
    mean_probabilities,
)
from cmkd_scale.memory.statistics import Moments

CLASS_ROWS = frozenset(
    {"class_mean", "class_variance", "class_factor", "class_count", "class_kept"}
)
"""Tables with a row a class; the others have one a prototype."""
SAMPLE_ROWS = frozenset({"spread"})
"""Tables with a row a sample."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a class becomes rows of the memory; the same for all classes."""

    head_weight: Tensor
    """[C, D] the teacher's head, which gives the soft labels."""
    head_bias: Tensor
    """[C]"""
    temperature: float
    """Of the soft labels."""
    prototypes_per_class: int | None = None
    """None takes the rule of ``prototype_count``."""
    covariance_rank: int = 4
    seed: int = 0
    """Of k-means."""
    previous: PrototypeMemory | None = None
    """A memory of the teacher before it moved: each class goes one pass of k-means on from its
    prototypes, so that they keep their number and their order; one that has lost its samples
    stays as it was. Only classes that are new change the number of prototypes."""

    def rows_before(self, label: int) -> slice:
        """Which rows of ``previous`` a class has; none if it is new."""
        if self.previous is None:
            return slice(0, 0)
        edges = torch.tensor([label, label + 1])
        return slice(*torch.searchsorted(self.previous.prototype_class, edges).tolist())

    def cluster(self, label: int, features: Tensor) -> Clusters:
        """Prototypes of a class with samples ``features`` [n, D], n >= 1."""
        if self.previous is not None:
            centres = self.previous.prototypes[self.rows_before(label)]
            if len(centres):
                return lloyd_step(features.numpy(), centres.numpy())
        wanted = prototype_count(len(features), self.prototypes_per_class)
        return cluster(features.numpy(), wanted, self.seed)


def describe_class(
    label: int, features: Tensor, rest: tuple[Tensor, ...], recipe: Recipe
) -> dict[str, Tensor]:
    """Rows of the memory's tables for one class; none of prototypes if no sample is kept.

    Args:
        label: the class.
        features: [n, D] its kept samples, in the order of the pass.
        rest: integer sums [1], [1, D], [1, D] of its other samples, see ``Moments``.
        recipe: how.
    """
    if len(features) == 0 and recipe.previous is not None:
        before = _rows_as_before(label, recipe.previous, recipe)
        if len(before["prototypes"]):
            return before
    moments = Moments(1, features.shape[1])
    moments.update(features, torch.zeros(len(features), dtype=torch.int64))
    moments.add_rows(torch.zeros(1, dtype=torch.int64), *rest)
    rows = empty_rows(recipe)
    if len(features):
        rows |= _prototype_rows(label, features, recipe.cluster(label, features), recipe)
    factor = low_rank_factor(features, recipe.covariance_rank).unsqueeze(0)
    variance = moments.variance().float()
    return rows | {
        "label": torch.tensor([label]),
        "class_mean": moments.mean().float(),
        "class_variance": variance,
        "class_factor": within_variance(factor, variance),
        "class_count": moments.count,
        "class_kept": torch.tensor([len(features)]),
    }


def empty_rows(recipe: Recipe) -> dict[str, Tensor]:
    """Every table with no row in it."""
    classes, dim = recipe.head_weight.shape
    listed = min(MOST_LISTED, classes)
    return {
        "label": torch.zeros(0, dtype=torch.int64),
        "class_mean": torch.zeros(0, dim),
        "class_variance": torch.zeros(0, dim),
        "class_factor": torch.zeros(0, recipe.covariance_rank, dim),
        "class_count": torch.zeros(0, dtype=torch.int64),
        "class_kept": torch.zeros(0, dtype=torch.int64),
        "prototype_class": torch.zeros(0, dtype=torch.int64),
        "prototypes": torch.zeros(0, dim),
        "prototype_mass": torch.zeros(0),
        "radius": torch.zeros(0),
        "soft_label_values": torch.zeros(0, listed),
        "soft_label_classes": torch.zeros(0, listed, dtype=torch.int32),
        "soft_label_rest": torch.zeros(0),
        "spread": torch.zeros(0),
    }


def _rows_as_before(label: int, memory: PrototypeMemory, recipe: Recipe) -> dict[str, Tensor]:
    """A class of which no sample is kept, as an earlier memory knew it; soft labels anew."""
    rows, own = recipe.rows_before(label), slice(label, label + 1)
    soft = head_says(
        memory.prototypes[rows],
        recipe.head_weight,
        recipe.head_bias,
        recipe.temperature,
        keep=MOST_LISTED,
    )
    # That memory may have had another rank.
    factor = memory.class_factor[own, : recipe.covariance_rank]
    missing = recipe.covariance_rank - factor.shape[1]
    return empty_rows(recipe) | {
        "label": torch.tensor([label]),
        "class_mean": memory.class_mean[own],
        "class_variance": memory.class_variance[own],
        "class_factor": functional.pad(factor, (0, 0, 0, missing)),
        "class_count": memory.class_count[own],
        "class_kept": memory.class_kept[own],
        "prototype_class": memory.prototype_class[rows],
        "prototypes": memory.prototypes[rows],
        "prototype_mass": memory.prototype_mass[rows],
        "radius": memory.radius[rows],
        **_columns(soft),
    }


def _columns(soft: SoftLabels) -> dict[str, Tensor]:
    return {
        "soft_label_values": soft.values,
        "soft_label_classes": soft.classes,
        "soft_label_rest": soft.rest,
    }


def _prototype_rows(
    label: int, features: Tensor, clusters: Clusters, recipe: Recipe
) -> dict[str, Tensor]:
    """Prototypes with what their samples say, and the spread of each sample."""
    centres = torch.from_numpy(clusters.centres)
    assignment = torch.from_numpy(clusters.assignment)
    count, sizes, origin = len(centres), clusters.sizes, centres.mean(0)
    # Anew, since what k-means knows is a difference of squares: 1e-3 where it should be 0.
    apart = torch.linalg.vector_norm(features - centres[assignment], dim=1)
    distance = torch.zeros(count, dtype=torch.float64).index_add_(0, assignment, apart.double())
    # A prototype of before that has lost its samples has mass 0, and its own soft label.
    alone = torch.from_numpy(np.flatnonzero(sizes == 0))
    soft = compress(
        mean_probabilities(
            torch.cat([features, centres[alone]]),
            torch.cat([assignment, alone]),
            count,
            recipe.head_weight,
            recipe.head_bias,
            recipe.temperature,
        ),
        MOST_LISTED,
    )
    return {
        "prototype_class": torch.full((count,), label),
        "prototypes": centres,
        "prototype_mass": torch.from_numpy(sizes / sizes.sum()).float(),
        "radius": (distance / torch.from_numpy(sizes).clamp(min=1)).float(),
        # About the centres' mean: far from the origin, matrix products lose the distances.
        "spread": torch.cdist(features - origin, centres - origin).mean(1),
        **_columns(soft),
    }
