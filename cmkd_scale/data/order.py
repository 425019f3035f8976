"""The order in which a data set is read: a pure function (seed, epoch, position) -> sample.

World size, workers and batch size are not inputs, so the global order is the same on any
machine and a state saved on 3 ranks continues on 5. Global batch b holds positions
b*B .. (b+1)*B - 1 of the endless sequence epoch 0, epoch 1, ...; rank r of W takes the
positions r, r+W, ... of each batch.

Up to ``POOL`` samples, an epoch is one uniform permutation. A larger epoch is read through
``LANES`` lanes at once: position p belongs to lane p mod LANES. The shards, in an order that
is drawn for the epoch, lie one after the other and are cut into equal lanes; each lane is
read block by block, and each block in an order of its own. So

- neighbours in the stream come from different lanes, hence mostly from different shards;
- a sample is drawn from LANES blocks, 98,304 samples (fewer where shards hold fewer than 256,
  so that not too many of them are open: a block is then four shards long);
- only the shards under those blocks are in use, some 200 to 500, and each is visited once an
  epoch, but for those that a border of lanes cuts;
- a world size that divides LANES, and the batch, gives each rank lanes of its own, and so
  shards of its own;
- memory is a few dozen bytes for each thousand samples, and any position is found at once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LANES = 96  # divided by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96
BLOCK = 1024
POOL = LANES * BLOCK
VERSION = "lanes-1"
"""Changes whenever the same seed would give another order: a state names it."""

_SHARDS_A_BLOCK = 4  # so that small shards do not all have to be open at once
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Ints = NDArray[np.int64]


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
    state = 0
    for part in parts:
        state = _mix(state ^ _mix(part % 2**64))
    return state


def _mix(value: int) -> int:
    """``mix64`` of one integer; numpy would take ten times as long."""
    z = (value + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def permutation(count: int, *key: int) -> Ints:
    """The permutation [count] that the integers ``key`` decide.

    Numbers are sorted by a keyed hash; equal hashes (one pair in 2^64) keep their order, so
    the result is a permutation always.
    """
    hashes = mix64(np.arange(count, dtype=np.uint64) ^ np.uint64(stable_hash(*key)))
    return np.argsort(hashes, kind="stable").astype(np.int64)


class Draw(Protocol):
    """Which samples an epoch holds; see ``sampling.py``."""

    @property
    def name(self) -> str:
        """Says how they are chosen, for the state of a stream."""

    @property
    def samples(self) -> int:
        """Number N of positions in every epoch."""

    def places(self, epoch: int) -> Ints | None:
        """[N] places in the split, ascending; None for 0 .. N - 1."""


class Order:
    """Endless order of the samples that a draw chooses from a split."""

    def __init__(self, draw: Draw, shard_starts: Ints, seed: int) -> None:
        """Nothing is computed before it is asked for.

        Args:
            draw: what each epoch holds.
            shard_starts: [S + 1] place at which each shard begins, and the end of the last.
            seed: decides the order.
        """
        self.draw = draw
        self.seed = seed
        self._shard_starts = shard_starts
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def name(self) -> str:
        """Says which order this is; equal names and seeds give equal orders of equal data."""
        return f"{VERSION} {self.draw.name}"

    def __len__(self) -> int:
        """Positions in an epoch, N."""
        return self.draw.samples

    def places(self, counts: Ints) -> Ints:
        """Places in the split of the samples number ``counts`` [n] of the endless sequence."""
        epochs, positions = np.divmod(counts, len(self))
        found = np.empty(len(counts), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._epoch(int(epoch)).places(positions[chosen])
        return found

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = _Epoch(
                self.draw.places(epoch), len(self), self._shard_starts, (self.seed, epoch)
            )
            while len(self._epochs) > 2:  # a batch may span the end of an epoch
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class _Epoch:
    """One epoch: positions to places."""

    def __init__(
        self, drawn: Ints | None, samples: int, shard_starts: Ints, key: tuple[int, int]
    ) -> None:
        self._drawn = drawn
        self._samples = samples
        self._key = key
        self._blocks: OrderedDict[int, Ints] = OrderedDict()
        self._lanes = 1 if samples <= POOL else LANES
        self._block = samples
        if self._lanes > 1:
            starts = shard_starts if drawn is None else np.searchsorted(drawn, shard_starts)
            counts = np.diff(starts)
            mean = -(-samples // int(np.count_nonzero(counts)))
            self._block = min(BLOCK, _SHARDS_A_BLOCK * mean)
            self._chunk_start, self._chunk_end = _chunks(starts[:-1], counts, key)

    def places(self, positions: Ints) -> Ints:
        """Places of positions [n] of 0 .. N - 1."""
        lanes, offsets = positions % self._lanes, positions // self._lanes
        blocks, offsets = np.divmod(offsets, self._block)
        items = np.empty(len(positions), dtype=np.int64)
        for block in np.unique(blocks):
            chosen = blocks == block
            items[chosen] = self._items(int(block))[lanes[chosen], offsets[chosen]]
        if self._lanes > 1:
            chunk = np.searchsorted(self._chunk_end, items, side="right")
            items += self._chunk_start[chunk]
            items[chunk > 0] -= self._chunk_end[chunk[chunk > 0] - 1]
        return items if self._drawn is None else self._drawn[items]

    def _items(self, block: int) -> Ints:
        """One block of each lane in the order in which it is read: [lanes, at most BLOCK]
        places in the row of chunks."""
        if block not in self._blocks:
            length, longer = divmod(self._samples, self._lanes)
            lane = np.arange(self._lanes)
            start = lane * length + np.minimum(lane, longer) + block * self._block
            size = np.minimum(self._block, length + (lane < longer) - block * self._block)
            if self._lanes == 1:
                # Without numbers of lane and block: small data sets were ordered before them.
                order = permutation(self._samples, *self._key)[None]
            else:
                keys = [stable_hash(*self._key, n, block) for n in range(self._lanes)]
                order = _permutations(size, np.array(keys, dtype=np.uint64))
            self._blocks[block] = start[:, None] + order
            while len(self._blocks) > 2:  # a batch may span the end of a block
                self._blocks.popitem(last=False)
        return self._blocks[block]


def _permutations(sizes: Ints, keys: NDArray[np.uint64]) -> Ints:
    """Row i begins with a permutation of sizes[i] numbers; sizes differ by one at most."""
    hashes = mix64(np.arange(sizes.max(), dtype=np.uint64) ^ keys[:, None])
    hashes[sizes < sizes.max(), -1] = np.iinfo(np.uint64).max
    return np.argsort(hashes, axis=1, kind="stable").astype(np.int64)


def _chunks(starts: Ints, counts: Ints, key: tuple[int, int]) -> tuple[Ints, Ints]:
    """Shards in the order of an epoch, each in chunks of at most BLOCK in an order of their own.

    Returns:
        [K] first item of each chunk, and [K] items up to its end in the new row.
    """
    pieces = -(-counts // BLOCK)
    shard = np.repeat(np.arange(len(counts)), pieces)
    piece = np.arange(len(shard)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = piece * counts[shard] // pieces[shard]
    last = (piece + 1) * counts[shard] // pieces[shard]
    shard_rank = np.argsort(permutation(len(counts), *key, 0))
    chunk_rank = np.argsort(permutation(len(shard), *key, 1))
    order = np.lexsort((chunk_rank, shard_rank[shard]))
    return (starts[shard] + first)[order], np.cumsum((last - first)[order])


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
