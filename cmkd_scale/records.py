"""The nouns that rooms exchange, with their shapes.

Letters used for shapes throughout the project: B samples in a batch, N samples in a
data set, C classes, D feature width, J prototypes, K prototypes of one class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

UNLABELLED = -1
"""The label of a sample without one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One stored sample before decoding: what a dataset adapter makes and a shard holds."""

    key: str
    """Unique in its split; letters, digits, ``_`` and ``-`` only (a dot would end the key)."""
    label: int
    """Index into the split's label names, or ``UNLABELLED``."""
    members: Mapping[str, bytes]
    """File extension without its dot (``png``, ``wav``, ``txt``, ``cls``, ``json``) to bytes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoded samples of one modality."""

    inputs: Tensor
    """[B, ...] float32, or int64 for bytes of text."""
    labels: Tensor
    """[B] int64, index into the label names of the student's own shards."""
    keys: tuple[str, ...]
    """[B] sample keys, for audits and for counting each sample once."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a step reads, by name, each [B or U, ...]: see ``data/companions``."""


class ModelOutput(NamedTuple):
    """What a model returns for a batch."""

    features: Tensor
    """[B, D] projected features, the space in which modalities are aligned."""
    logits: Tensor
    """[B, C] the head's scores."""
    stages: tuple[Tensor, ...]
    """Outputs of the encoder's stages, shallow to deep, for methods that align them."""
