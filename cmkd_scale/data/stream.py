"""Reads stored samples by their place in a split, in any order, straight from the tars."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.order import mix64, stable_hash
from cmkd_scale.data.shards import Manifest, SampleIndex, load_index
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.records import Sample

_OPEN_FILES = 64


class SampleReader:
    """Random access to the samples of a split with positioned reads.

    Keeps at most 64 files open. Safe to hand to a forked or spawned worker: files are opened
    by the process that reads.
    """

    def __init__(self, manifest: Manifest, index: SampleIndex | None = None) -> None:
        """Open a split; its index is read if not given."""
        self.manifest = manifest
        self.index = load_index(manifest) if index is None else index
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.index)

    def __getitem__(self, place: int) -> Sample:
        """The sample at ``place``, its members as stored.

        Raises:
            IntegrityError: the shard is shorter than its index says, or cannot be read.
        """
        shard = int(self.index.shard[place])
        members = {}
        for column, extension in enumerate(self.index.extensions):
            size = int(self.index.size[place, column])
            if size >= 0:
                offset = int(self.index.offset[place, column])
                members[extension] = self._read(shard, offset, size)
        return Sample(
            key=self.index.key(place), label=int(self.index.labels[place]), members=members
        )

    def __getstate__(self) -> dict[str, object]:
        """Everything but the open files."""
        return {"manifest": self.manifest, "index": self.index, "_files": OrderedDict()}

    def close(self) -> None:
        """Close the open shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.manifest.directory / self.manifest.shards[shard].url
        try:
            payload = os.pread(self._open(shard), size, offset)
        except OSError as error:
            raise IntegrityError(
                f"Shard {path} cannot be read: {error}. Run `cmkd shards verify "
                f"{self.manifest.directory}`."
            ) from None
        if len(payload) != size:
            raise IntegrityError(
                f"Shard {path} ends before its sample index says. Run `cmkd shards verify "
                f"{self.manifest.directory}` and build or copy it again."
            )
        return payload

    def _open(self, shard: int) -> int:
        # File offsets are not shared by pread, but a forked child must not share the cache.
        key = (os.getpid(), shard)
        if key not in self._files:
            path = self.manifest.directory / self.manifest.shards[shard].url
            self._files[key] = os.open(path, os.O_RDONLY)
            while len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(key)
        return self._files[key]


def labelled_subset(
    index: SampleIndex, *, classes: int, n_per_class: int | None, seed: int
) -> NDArray[np.int64]:
    """Places of the samples to train on, ascending: all labelled, or ``n_per_class`` a class.

    The choice is by a hash of each sample's place, keyed by ``seed``; with a growing
    ``n_per_class`` the subsets are nested.

    Raises:
        UsageError: a class has fewer than ``n_per_class`` samples, or nothing is labelled.
    """
    labelled = np.flatnonzero(index.labels >= 0)
    if len(labelled) == 0:
        raise UsageError("No sample of this split has a label, and training needs labels.")
    if n_per_class is None:
        return labelled
    counts = np.bincount(index.labels[labelled], minlength=classes)
    short = np.flatnonzero(counts < n_per_class)
    if len(short):
        remedy = f"Choose at most {counts.min()} or build more." if counts.min() else "Build more."
        raise UsageError(
            f"data.n_per_class={n_per_class}, but {len(short)} of {classes} classes have fewer "
            f"labelled samples (class index {short[0]} has {counts[short[0]]}). {remedy}"
        )
    rank = mix64(labelled.astype(np.uint64) ^ np.uint64(stable_hash(seed)))
    order = np.lexsort((rank, index.labels[labelled]))
    by_class = labelled[order]
    starts = np.cumsum(counts) - counts
    place_in_class = np.arange(len(by_class)) - starts[index.labels[by_class]]
    chosen: NDArray[np.int64] = np.sort(by_class[place_in_class < n_per_class])
    return chosen
