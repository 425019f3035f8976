"""Small teachers for tests: labelled features around class centres, and a head."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.build import TeacherSamples, build_memory
from cmkd_scale.memory.statistics import Moments


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


def build_from(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, *, shuffle: int | None = None
) -> PrototypeMemory:
    """Build a memory; each rank takes every W-th sample, in an order of its own if asked."""
    share = torch.arange(len(labels))[distributed.rank() :: distributed.world_size()]
    if shuffle is not None:
        generator = torch.Generator().manual_seed(shuffle)
        share = share[torch.randperm(len(share), generator=generator)]
    classes, dim = weight.shape
    moments, risk = Moments(classes, dim), Moments(classes, 1)
    moments.update(features[share], labels[share])
    risk.update(torch.full((len(share), 1), 0.5), labels[share])
    samples = TeacherSamples(
        index=share,
        labels=labels[share],
        features=features[share],
        logits=features[share] @ weight.T + bias,
        moments=moments,
        risk=risk,
    )
    return build_memory(
        samples,
        class_names=[f"class {label}" for label in range(classes)],
        head_weight=weight,
        head_bias=bias,
        prototypes_per_class=None,
        temperature=4.0,
        seed=0,
        provenance={"made": "for a test"},
    )


def example_memory(classes: int = 6, dim: int = 8) -> PrototypeMemory:
    """A memory of a small teacher."""
    return build_from(*teacher_data(classes=classes, dim=dim))
