"""The order in which a data set is read: a pure function (seed, epoch, position) -> sample.

World size, workers and batch size are not inputs, so the global order is the same on any
machine and a state saved on 3 ranks continues on 5. Global batch b holds positions
b*B .. (b+1)*B - 1 of the endless sequence epoch 0, epoch 1, ...; rank r of W takes the
positions r, r+W, ... of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finaliser: a bijective hash of 64-bit integers.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators"
    (OOPSLA 2014), figure 16. Chosen over numpy's generators because their streams may
    change between releases and an order must not.
    """
    z = values + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stable_hash(*parts: int) -> int:
    """Hash integers to 64 bits, the same in every process and release."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix64(state ^ mix64(np.array([part % 2**64], dtype=np.uint64)))
    return int(state[0])


def epoch_order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation [samples] of one epoch: entry p is the sample read at position p.

    Samples are sorted by a keyed hash of their index; equal hashes (one pair in 2^64) keep
    their index order, so the result is a permutation always.
    """
    key = np.uint64(stable_hash(seed, epoch))
    hashes = mix64(np.arange(samples, dtype=np.uint64) ^ key)
    return np.argsort(hashes, kind="stable").astype(np.int64)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the endless sequence of epochs."""

    epoch: int
    position: int

    @staticmethod
    def at(count: int, samples: int) -> Position:
        """The place after ``count`` samples of a data set with ``samples`` samples."""
        return Position(*divmod(count, samples))


def rank_positions(start: int, stop: int, rank: int, world_size: int) -> range:
    """Positions of ``start .. stop - 1`` that rank ``rank`` of ``world_size`` reads."""
    return range(start + rank, stop, world_size)
