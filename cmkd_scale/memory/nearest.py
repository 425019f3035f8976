"""The nearest prototypes of features, exactly, with FAISS or without it."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.prototypes import PrototypeIndex

_MOST_ENTRIES = 2**22  # distances that are held at a time


def nearest(prototypes: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Euclidean distances [B, k], rising, and the nearest of ``prototypes`` [J, D], k <= J.

    Every prototype is looked at: an evaluation must not depend on how well a search guesses.
    FAISS does it where it is installed, matrix products do where it is not.

    Args:
        prototypes: [J, D] on the device of ``features``.
        features: [B, D]
        k: prototypes to find for each feature.
    """
    try:
        index = PrototypeIndex(prototypes, nlist=0)
    except UsageError:  # FAISS is optional
        return _by_products(prototypes, features, k)
    return index.nearest(features, k)


def _by_products(prototypes: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, some features at a time."""
    # Products lose their bits far from the origin; distances know no origin.
    origin = prototypes.float().mean(0)
    rows = prototypes.float() - origin
    step = max(1, _MOST_ENTRIES // len(rows))
    found = [
        torch.cdist(part.float() - origin, rows).topk(k, dim=1, largest=False)
        for part in features.split(step)
    ]
    distances, ids = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(ids)
