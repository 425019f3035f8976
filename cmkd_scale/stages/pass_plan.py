"""What one pass over a split reads: the same batches whatever ranks and manifest.

What a teacher says of a sample may depend, in its last bits, on the batch around it. So a
batch is consecutive labelled samples of one shard, and shards are taken in the order of their
digests: neither the number of ranks nor the order in which a manifest lists shards has a part
in it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.stages.streams import SplitData


@dataclass(frozen=True, slots=True)
class Plan:
    """All labelled samples of a split, in the order of the pass."""

    places: NDArray[np.int64]
    """[N] where each lies in the split."""
    bounds: NDArray[np.int64]
    """[b + 1] position at which each batch begins, and N."""

    @staticmethod
    def make(data: SplitData, batch_size: int) -> Plan:
        """Cut each shard into batches of at most ``batch_size`` samples."""
        shards = data.reader.manifest.shards
        labelled = data.labelled()
        order = sorted(range(len(shards)), key=lambda n: (shards[n].sha256, shards[n].url))
        edges = np.searchsorted(labelled, data.reader.starts)
        parts = [labelled[edges[n] : edges[n + 1]] for n in order]
        bounds, position = [0], 0
        for part in parts:
            bounds += range(position + batch_size, position + len(part), batch_size)
            position += len(part)
            bounds += [position] if len(part) else []
        return Plan(np.concatenate([labelled[:0], *parts]), np.array(bounds, dtype=np.int64))

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.bounds) - 1

    def share(self, finished: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the batches that this rank passes; those ``finished`` are left out.

        They follow one another, so that a rank reads few shards.
        """
        todo = np.setdiff1d(np.arange(len(self)), finished)
        return np.array_split(todo, distributed.world_size())[distributed.rank()]

    def largest_share(self, finished: NDArray[np.int64]) -> int:
        """Batches of the rank that passes most of them."""
        return -(-(len(self) - len(finished)) // distributed.world_size())

    def batch(self, number: int) -> NDArray[np.int64]:
        """Places of the samples of one batch, ascending."""
        return self.places[self.bounds[number] : self.bounds[number + 1]]


def choose_by_key(data: SplitData, plan: Plan, limit: int) -> NDArray[np.bool_]:
    """[N] whether a sample, in the order of the pass, is among those kept.

    Of each class, the ``limit`` samples whose keys have the smallest hashes: a choice that
    more samples, fewer shards or another order of them change as little as possible. Equal
    hashes leave the order of the pass to decide.
    """
    labels = data.labels[plan.places]
    crowded = np.bincount(labels, minlength=len(data.label_names))[labels] > limit
    kept = ~crowded
    positions = np.flatnonzero(crowded)
    hashes = np.array(
        [key_hash(data.reader.key(place)) for place in plan.places[positions].tolist()],
        dtype=np.uint64,
    )
    order = np.lexsort((hashes, labels[positions]))
    ordered = labels[positions][order]
    rank_in_class = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    kept[positions[order[rank_in_class < limit]]] = True
    return kept


def key_hash(key: str) -> int:
    """64 bits of a sample's key (BLAKE2b, RFC 7693): the same in every process and release."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
