"""Synthetic memories of any size for ``scale.py``, with features that lie as a teacher's do.

A class is a centre and LATENT directions in which its features vary; features of all classes
have entries of mean square 1, as the models' last LayerNorm leaves them. No table of prototypes
by classes is made: soft labels come from a few templates, turned to each class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import MOST_LISTED, SoftLabels, compress, concatenate

LATENT = 8
WITHIN = 0.3
"""Part of the mean square that is variation within a class."""
_NOISE = 0.2  # standard deviation in every direction: the student is not the teacher
_TEMPLATES = 32


@dataclass(frozen=True, slots=True)
class Features:
    """Where the features of each class lie."""

    centres: Tensor
    """[C, D]"""
    directions: Tensor
    """[C, LATENT, D]"""

    @classmethod
    def of(cls, classes: int, dim: int) -> Features:
        """Those of ``classes`` classes; the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(classes, dim, generator=generator)
        directions = torch.randn(classes, LATENT, dim, generator=generator)
        return cls((1.0 - WITHIN) ** 0.5 * centres, (WITHIN / LATENT) ** 0.5 * directions)

    def teacher(self, per_class: int) -> Tensor:
        """[C, K, D] features of the teacher."""
        generator = torch.Generator().manual_seed(1)
        classes = len(self.centres)
        latent = torch.randn(classes, per_class, LATENT, generator=generator)
        return torch.baddbmm(self.centres.unsqueeze(1), latent, self.directions)

    def student(self, batch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Features [B, D] and labels [B] of a batch of the student."""
        generator = torch.Generator().manual_seed(2 + seed)
        classes, dim = self.centres.shape
        labels = torch.randint(classes, (batch,), generator=generator)
        latent = torch.randn(batch, 1, LATENT, generator=generator)
        around = torch.bmm(latent, self.directions[labels]).squeeze(1)
        noise = _NOISE * torch.randn(batch, dim, generator=generator)
        return self.centres[labels] + around + noise, labels


def synthetic_memory(features: Features, per_class: int) -> PrototypeMemory:
    """A memory of ``per_class`` prototypes of each class of ``features``."""
    (classes, dim), prototypes = features.centres.shape, len(features.centres) * per_class
    rows = features.teacher(per_class)
    sample, labels = features.student(64, seed=0)
    distances = (sample.unsqueeze(1) - rows[labels, : min(per_class, 256)]).square().sum(2).sqrt()
    soft = soft_labels(classes, per_class)
    return PrototypeMemory(
        class_names=tuple(map(str, range(classes))),
        prototypes=rows.flatten(0, 1),
        prototype_class=torch.arange(classes).repeat_interleave(per_class),
        prototype_mass=torch.full((prototypes,), 1 / per_class),
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
        radius=torch.ones(prototypes),
        class_mean=features.centres,
        class_variance=torch.full((classes, dim), WITHIN),
        class_factor=features.directions,
        class_count=torch.full((classes,), 100),
        class_kept=torch.full((classes,), 100),
        class_risk=torch.zeros(classes),
        head_weight=features.centres / dim**0.5,
        head_bias=torch.zeros(classes),
        cost_scale=distances.mean(1).median(),
    )


def soft_labels(classes: int, per_class: int) -> SoftLabels:
    """Soft labels of ``per_class`` prototypes of each class, which is the likeliest one."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(min(_TEMPLATES, per_class), classes, generator=generator)
    scores[:, 0] += 8.0
    templates = compress(torch.softmax(scores, dim=1), MOST_LISTED)
    rows = torch.arange(per_class) % len(scores)
    values, listed, rest = (column[rows] for column in templates)
    if listed.shape[1] == classes:  # uncut: classes stand in their order
        parts = [SoftLabels(values.roll(label, 1), listed, rest) for label in range(classes)]
    else:
        parts = [
            SoftLabels(values, (listed + label).remainder_(classes), rest)
            for label in range(classes)
        ]
    return concatenate(parts)
