"""Reads stored samples by their place in a split, in any order, straight from the tars."""

from __future__ import annotations

import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.damage import DamagedError, Incident
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.sample_index import SampleIndex
from cmkd_scale.data.shards import map_index
from cmkd_scale.errors import IntegrityError
from cmkd_scale.records import UNLABELLED, Sample

_MOST_OPEN = 512  # the order keeps about 200 to 500 shards in use, see order.py


@dataclass(frozen=True, slots=True)
class _Shard:
    """An open shard."""

    index: SampleIndex
    file: int
    """Descriptor of the tar."""
    wanted: tuple[tuple[int, str], ...]
    """Columns of the index to read, and their extensions."""


class SampleReader:
    """Random access to the samples of a split with positioned reads.

    Shards are opened when they are needed; a bounded number of them stays open. A positioned
    read takes a microsecond longer than one from a mapped file, but where a shard has become
    shorter it fails cleanly, while a mapped file would kill the process. Every payload is
    checked against its checksum.
    """

    def __init__(
        self,
        manifest: Manifest,
        wants: Callable[[str], bool] | None = None,
        label_index: Sequence[int] | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            manifest: of the split.
            wants: which extensions to read; None reads all members.
            label_index: [C] label to give out for each that is stored; None gives those.
        """
        self.manifest = manifest
        self.wants = wants
        self.label_index = label_index
        given = range(len(manifest.label_names)) if label_index is None else label_index
        # The last entry is what the stored label -1 finds.
        self._labels = np.array([*given, UNLABELLED], dtype=np.int32)
        counts = [shard.nsamples for shard in manifest.shards]
        self.starts: NDArray[np.int64] = np.cumsum([0, *counts], dtype=np.int64)
        """[S + 1] place of the first sample of each shard, and the number of samples."""
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._indexes: OrderedDict[int, SampleIndex] = OrderedDict()
        # What failed once, maybe after many attempts, is not tried again for each sample.
        self._broken: dict[int, DamagedError] = {}
        self._unindexed: dict[int, DamagedError] = {}
        self._most_open = min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def __len__(self) -> int:
        """Number of samples N."""
        return int(self.starts[-1])

    def __getitem__(self, place: int) -> Sample:
        """The sample at ``place``, its members as stored.

        Raises:
            DamagedError: it cannot be read, or is not what was stored.
        """
        return self._read(*self._locate(place))

    def __getstate__(self) -> dict[str, object]:
        """All but what is open."""
        return {
            "manifest": self.manifest,
            "wants": self.wants,
            "label_index": self.label_index,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start again with nothing open."""
        self.__init__(**state)  # type: ignore[misc]

    def read(self, places: NDArray[np.int64]) -> Iterator[Sample | DamagedError]:
        """The samples at ``places`` [n] in that order, or why there are none."""
        shards = np.searchsorted(self.starts, places, side="right") - 1
        rows = places - self.starts[shards]
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            try:
                yield self._read(shard, row)
            except DamagedError as error:
                yield error

    def labels(self) -> NDArray[np.int32]:
        """[N] labels of all samples; reads the index of every shard.

        Raises:
            DamagedError: an index cannot be read.
        """
        parts = [map_index(self.manifest, n).labels for n in range(len(self.manifest.shards))]
        stored = np.concatenate([np.zeros(0, np.int32), *parts])
        labels: NDArray[np.int32] = self._labels[stored]
        return labels

    def key(self, place: int) -> str:
        """The key of a sample; its shard itself is not opened."""
        shard, row = self._locate(place)
        return self._index(shard).key(row)

    def incident(self, place: int, error: DamagedError) -> Incident:
        """Put a name to a damaged sample."""
        shard, _ = self._locate(place)
        try:
            key = self.key(place)
        except DamagedError:
            key = f"number {place}"
        name = self.manifest.shards[shard].url
        # A message about the shard as a whole names it already.
        where = "" if name in str(error) else f" of {self.manifest.address}/{name}"
        return Incident(
            place=place,
            reason=error.reason,
            shard=name,
            key=key,
            message=f"Sample {key}{where}: {error}",
        )

    def close(self) -> None:
        """Close the open shards."""
        while self._shards:
            os.close(self._shards.popitem()[1].file)
        self._indexes.clear()

    def __del__(self) -> None:
        """Descriptors are numbers, which nothing else closes."""
        self.close()

    def _locate(self, place: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, place, side="right")) - 1
        return shard, int(place - self.starts[shard])

    def _read(self, number: int, row: int) -> Sample:
        shard = self._shards.get(number)
        if shard is None:
            shard = self._open(number)
        else:
            self._shards.move_to_end(number)
        index, members = shard.index, {}
        for column, extension in shard.wanted:
            size = index.size.item(row, column)
            if size >= 0:
                payload = _read_at(shard.file, index.offset.item(row, column), size)
                if zlib.crc32(payload) != index.crc32.item(row, column):
                    raise DamagedError(
                        "checksum", f"its {extension} has changed since the shard was built."
                    )
                members[extension] = payload
        label = self._labels.item(index.labels.item(row))
        return Sample(key=index.key(row), label=label, members=members)

    def _index(self, number: int) -> SampleIndex:
        if number in self._shards:
            return self._shards[number].index
        if number in self._unindexed:
            raise self._unindexed[number]
        if number not in self._indexes:
            try:
                self._indexes[number] = map_index(self.manifest, number)
            except DamagedError as error:
                self._unindexed[number] = error
                raise
            if len(self._indexes) > self._most_open:
                self._indexes.popitem(last=False)
        return self._indexes[number]

    def _open(self, number: int) -> _Shard:
        if number in self._broken:
            raise self._broken[number]
        record = self.manifest.shards[number]
        try:
            index = self._index(number)
            file = self.manifest.storage.open(
                record.url, size=record.filesize, sha256=record.sha256
            )
        except IntegrityError as error:
            damaged = error if isinstance(error, DamagedError) else None
            self._broken[number] = damaged or DamagedError("missing_shard", str(error))
            raise self._broken[number] from None
        wanted = tuple(
            (column, extension)
            for column, extension in enumerate(index.extensions)
            if self.wants is None or self.wants(extension)
        )
        self._indexes.pop(number, None)
        shard = self._shards[number] = _Shard(index, file, wanted)
        if len(self._shards) > self._most_open:
            os.close(self._shards.popitem(last=False)[1].file)
        return shard


def _read_at(file: int, offset: int, size: int) -> bytes:
    try:
        payload = os.pread(file, size, offset)
    except OSError as error:
        raise DamagedError("short_read", f"it cannot be read ({error.strerror}).") from None
    if len(payload) != size:
        raise DamagedError("short_read", "the shard ends before its index says.")
    return payload
