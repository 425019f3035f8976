"""How well an order mixes, as a number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.order import Ints, Order
from cmkd_scale.data.sampling import Natural

_BATCHES = 200


def same_shard(shards: NDArray[np.integer]) -> float:
    """Chance that two samples of a batch are of one shard.

    Args:
        shards: [batches, B] shard of each sample.
    """
    batches, size = shards.shape
    ordered = np.sort(shards, axis=1)
    pairs = 0
    for row in ordered:
        counts = np.diff(np.flatnonzero(np.diff(row, prepend=-1, append=-1)))
        pairs += int((counts * (counts - 1)).sum())
    return float(pairs / (batches * size * (size - 1)))


def shared_shards(shard_starts: Ints, *, batch_size: int = 256, seed: int = 0) -> float:
    """How often two samples of a batch are of one shard, over how often in a uniform permutation.

    1 is as good as a uniform permutation, 0 means never; shards are what is stored together,
    often by class or by origin. Measured over 200 batches, evenly spaced in an epoch.

    Args:
        shard_starts: [S + 1] place at which each shard begins, and the end of the last.
        batch_size: samples of a global batch B; no more than there are samples.
        seed: of the order.
    """
    samples = int(shard_starts[-1])
    order = Order(Natural(samples), shard_starts, seed)
    size = min(batch_size, samples)
    counts = np.diff(shard_starts).astype(np.float64)
    by_chance = (counts * (counts - 1)).sum() / (samples * (samples - 1.0)) if samples > 1 else 0.0
    if size < 2 or by_chance == 0:
        return 1.0  # no two samples can be of one shard
    begins = np.unique(np.linspace(0, samples - size, _BATCHES).astype(np.int64))
    places = order.places((begins[:, None] + np.arange(size)).ravel())
    shards = np.searchsorted(shard_starts, places, side="right") - 1
    return float(same_shard(shards.reshape(-1, size)) / by_chance)
