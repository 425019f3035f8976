"""From the frozen teacher's features to a memory; equal bits for every world size and order.

Every rank hands in the samples it has passed through the teacher. Moments are merged
exactly (``statistics``); the bounded sample of each class that k-means sees is sorted by
the sample's place in the data set; each class is clustered by the rank that owns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.prototypes import cluster, prototype_count
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.memory.sync import gather_sorted, merge_moments


@dataclass(frozen=True, slots=True)
class TeacherSamples:
    """What one rank's share of the teacher's pass left, and the held-out risk."""

    index: Tensor
    """[n] int64 place of each kept sample in the data set; unique over ranks."""
    labels: Tensor
    """[n] int64"""
    features: Tensor
    """[n, D]"""
    logits: Tensor
    """[n, C]"""
    moments: Moments
    """Of every sample this rank has seen, kept or not."""
    risk: Moments
    """Held-out cross-entropy, width 1."""


def build_memory(
    samples: TeacherSamples,
    *,
    class_names: Sequence[str],
    head_weight: Tensor,
    head_bias: Tensor,
    prototypes_per_class: int | None,
    temperature: float,
    seed: int,
    provenance: Mapping[str, Any],
) -> PrototypeMemory:
    """Cluster each class and assemble the memory; a collective call.

    Args:
        samples: this rank's share.
        class_names: names of the C classes.
        head_weight: [C, D] the teacher's head.
        head_bias: [C]
        prototypes_per_class: prototypes a class, or None for the rule.
        temperature: of the soft labels.
        seed: of k-means.
        provenance: stored beside the memory.

    Raises:
        UsageError: no sample at all.
    """
    merge_moments(samples.moments)
    merge_moments(samples.risk)
    index, labels, features, logits = gather_sorted(
        samples.index, samples.labels, samples.features, samples.logits
    )
    if len(index) == 0:
        raise UsageError("The teacher's data has no labelled sample to build a memory from.")
    soft = torch.softmax(logits.float() / temperature, dim=1)
    owned = range(distributed.rank(), len(class_names), distributed.world_size())
    parts = [
        _cluster_class(
            label, features[labels == label], soft[labels == label], prototypes_per_class, seed
        )
        for label in owned
        if bool((labels == label).any())
    ]
    table = _gather_classes(parts, features.shape[1], soft.shape[1])
    risk = samples.risk.mean()[:, 0]
    risk[samples.risk.count == 0] = float("nan")
    return PrototypeMemory(
        class_names=tuple(class_names),
        class_mean=samples.moments.mean().float(),
        class_variance=samples.moments.variance().float(),
        class_count=samples.moments.count,
        class_risk=risk.float(),
        head_weight=head_weight.detach().float().cpu(),
        head_bias=head_bias.detach().float().cpu(),
        temperature=temperature,
        provenance=provenance,
        **table,
    )


def _cluster_class(
    label: int, features: Tensor, soft: Tensor, wanted: int | None, seed: int
) -> dict[str, Tensor]:
    """Prototypes of one class, with the spread of each of its samples."""
    rows = features.float().numpy()
    clusters = cluster(rows, prototype_count(len(rows), wanted), seed)
    count = len(clusters.centres)
    sizes = np.bincount(clusters.assignment, minlength=count)
    # One-hot products in float64, in sample order: sums that do not depend on threads.
    members = np.eye(count)[clusters.assignment]
    mean_soft = members.T @ soft.double().numpy() / sizes[:, None]
    radius = members.T @ clusters.distance.astype(np.float64) / sizes
    spread = torch.cdist(features.float(), torch.from_numpy(clusters.centres)).mean(1)
    return {
        "prototype_class": torch.full((count,), label),
        "prototypes": torch.from_numpy(clusters.centres),
        "prototype_mass": torch.from_numpy(sizes / sizes.sum()).float(),
        "soft_labels": torch.from_numpy(mean_soft).float(),
        "radius": torch.from_numpy(radius).float(),
        "spread": spread,
    }


def _gather_classes(parts: list[dict[str, Tensor]], dim: int, classes: int) -> dict[str, Tensor]:
    """Tables of all ranks' prototypes in class order, and the unit of cost."""
    empty = {
        "prototype_class": torch.zeros(0, dtype=torch.int64),
        "prototypes": torch.zeros(0, dim),
        "prototype_mass": torch.zeros(0),
        "soft_labels": torch.zeros(0, classes),
        "radius": torch.zeros(0),
        "spread": torch.zeros(0),
    }
    local = {name: torch.cat([part[name] for part in parts] or [empty[name]]) for name in empty}
    spread = distributed.gather_rows(local.pop("spread"))
    gathered = {name: distributed.gather_rows(rows) for name, rows in local.items()}
    order = torch.argsort(gathered["prototype_class"], stable=True)
    table = {name: rows[order] for name, rows in gathered.items()}
    # A class of identical samples has no spread; the unit must not be zero.
    table["cost_scale"] = spread.median().clamp(min=1e-6)
    return table
