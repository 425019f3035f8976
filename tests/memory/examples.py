"""Small teachers for tests: labelled features around class centres, and a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.build import build_memory
from cmkd_scale.memory.one_class import Recipe
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments

NONE = torch.zeros(0, dtype=torch.int64)


def teacher_data(
    classes: int = 6, per_class: int = 30, dim: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [N, D], labels [N], head weight [C, D] and bias [C]; class sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(classes, dim, generator=generator)
    sizes = [per_class - 3 * label for label in range(classes)]
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    features = centres[labels] + torch.randn(len(labels), dim, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    return features[order], labels[order], centres, torch.zeros(classes)


def first_of_each_class(labels: Tensor, limit: int) -> Tensor:
    """[N] bool: whether a sample is among the first ``limit`` of its class."""
    before = [int((labels[:place] == label).sum()) for place, label in enumerate(labels)]
    return torch.tensor(before) < limit if len(labels) else labels.bool()


def batches_of(
    features: Tensor, labels: Tensor, *, size: int = 16, limit: int = 4096
) -> list[PassedBatch]:
    """The pass of a teacher over its data: all of its batches."""
    kept = first_of_each_class(labels, limit)
    positions = torch.arange(len(labels))
    return [
        PassedBatch(number, at, labels[at], features[at], kept[at], NONE)
        for number, at in enumerate(positions.split(size))
        if len(at)
    ]


def spool_of(batches: list[PassedBatch], directory: Path | None = None, *, dim: int = 8) -> Spool:
    """A spool of this rank's share of the batches."""
    spool = Spool(dim, directory)
    for batch in batches[distributed.rank() :: distributed.world_size()]:
        spool.add(batch)
        if batch.number % 3 == 0:  # parts of different sizes
            spool.flush()
    spool.flush()
    return spool


def build_with(
    spool: Spool,
    weight: Tensor,
    bias: Tensor,
    *,
    prototypes_per_class: int | None = None,
    covariance_rank: int = 4,
    previous: PrototypeMemory | None = None,
) -> PrototypeMemory:
    """Build a memory; the held-out risk is 0.5 in every class that has samples."""
    classes = len(bias)
    risk = Moments(classes, 1)
    kept, rest = spool.counts(classes)
    labels = (kept + rest).nonzero()[:, 0]
    risk.update(torch.full((len(labels), 1), 0.5), labels)
    recipe = Recipe(weight, bias, 4.0, prototypes_per_class, covariance_rank)
    recipe = replace(recipe, previous=previous)
    return build_memory(
        spool,
        risk,
        recipe,
        class_names=[f"class {label}" for label in range(classes)],
        provenance={"made": "for a test"},
    )


def build_from(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, *, limit: int = 4096
) -> PrototypeMemory:
    """Build a memory; each rank takes every W-th batch."""
    batches = batches_of(features, labels, limit=limit)
    return build_with(spool_of(batches, dim=weight.shape[1]), weight, bias)


def example_memory(classes: int = 6, dim: int = 8) -> PrototypeMemory:
    """A memory of a small teacher."""
    return build_from(*teacher_data(classes=classes, dim=dim))
