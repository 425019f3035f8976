"""What the memory says of one class: prototypes, soft labels, moments, covariance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cmkd_scale.memory.covariance import low_rank_factor
from cmkd_scale.memory.kmeans import Clusters, cluster, lloyd_step, prototype_count
from cmkd_scale.memory.soft_labels import MOST_LISTED, compress, mean_probabilities
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
    previous: Tensor | None = None
    """[J, D] prototypes of an earlier memory of a teacher that has moved since: each class goes
    one pass of k-means on from them, so that they keep their number and their order."""
    previous_class: Tensor | None = None
    """[J] their classes, ascending."""

    def cluster(self, label: int, features: Tensor) -> Clusters:
        """Prototypes of a class with samples ``features`` [n, D], n >= 1."""
        if self.previous is not None and self.previous_class is not None:
            edges = torch.searchsorted(self.previous_class, torch.tensor([label, label + 1]))
            centres = self.previous[edges[0] : edges[1]]
            if len(centres):
                return lloyd_step(features.numpy(), centres.numpy())
        wanted = prototype_count(len(features), self.prototypes_per_class)
        return cluster(features.numpy(), wanted, self.seed)


def describe_class(
    label: int, features: Tensor, rest: tuple[Tensor, ...], recipe: Recipe
) -> dict[str, Tensor]:
    """Rows of the memory's tables for one class; none of prototypes if it has no sample.

    Args:
        label: the class.
        features: [n, D] its kept samples, in the order of the pass.
        rest: integer sums [1], [1, D], [1, D] of its other samples, see ``Moments``.
        recipe: how.
    """
    moments = Moments(1, features.shape[1])
    moments.update(features, torch.zeros(len(features), dtype=torch.int64))
    moments.add_rows(torch.zeros(1, dtype=torch.int64), *rest)
    rows = empty_rows(recipe)
    if len(features):
        rows |= _prototype_rows(label, features, recipe.cluster(label, features), recipe)
    factor = low_rank_factor(features, recipe.covariance_rank)
    return rows | {
        "label": torch.tensor([label]),
        "class_mean": moments.mean().float(),
        "class_variance": moments.variance().float(),
        "class_factor": factor.unsqueeze(0),
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


def _prototype_rows(
    label: int, features: Tensor, clusters: Clusters, recipe: Recipe
) -> dict[str, Tensor]:
    """Prototypes with what their samples say, and the spread of each sample."""
    centres = torch.from_numpy(clusters.centres)
    assignment = torch.from_numpy(clusters.assignment)
    count, sizes = len(centres), clusters.sizes
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
        "soft_label_values": soft.values,
        "soft_label_classes": soft.classes,
        "soft_label_rest": soft.rest,
        "spread": torch.cdist(features, centres).mean(1),
    }
