"""Reads stored samples by their place in a split, in any order, straight from the tars."""

from __future__ import annotations

import functools
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.damage import DamagedError, Incident
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.sample_index import SampleIndex
from cmkd_scale.data.shards import map_index
from cmkd_scale.data.storage import TOO_MANY_FILES, LocalDirectory
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.records import UNLABELLED, Sample

_MOST_OPEN = 512  # the order keeps about 200 to 500 shards in use, see order.py
_DESCRIPTORS = 8192  # asked of the system; a reader takes a quarter of what it gets at most
_THREADS = 16


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
        self._labels = [*given, UNLABELLED]
        counts = [shard.nsamples for shard in manifest.shards]
        self.starts: NDArray[np.int64] = np.cumsum([0, *counts], dtype=np.int64)
        """[S + 1] place of the first sample of each shard, and the number of samples."""
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._indexes: OrderedDict[int, SampleIndex] = OrderedDict()
        # What failed once, maybe after many attempts, is not tried again for each sample.
        self._broken: dict[int, DamagedError] = {}
        self._unindexed: dict[int, DamagedError] = {}
        self._open_bytes = 0
        self._most_open = min(_MOST_OPEN, _descriptors() // 4)

    def __len__(self) -> int:
        """Number of samples N."""
        return int(self.starts[-1])

    def __getitem__(self, place: int) -> Sample:
        """The sample at ``place``, its members as stored.

        Raises:
            DamagedError: it cannot be read, or is not what was stored.
            IntegrityError: its server cannot be reached.
            UsageError: this program may open too few files.
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

    def read(self, places: NDArray[np.int64]) -> list[Sample | DamagedError]:
        """The samples at ``places`` [n] in that order, or why there are none."""
        shards = np.searchsorted(self.starts, places, side="right") - 1
        rows = places - self.starts[shards]
        return list(map(self._try_to_read, shards.tolist(), rows.tolist()))

    def _try_to_read(self, number: int, row: int) -> Sample | DamagedError:
        try:
            return self._read(number, row)
        except DamagedError as error:
            return error

    def labels(self) -> NDArray[np.int32]:
        """[N] labels of all samples; reads the index of every shard.

        Raises:
            DamagedError: an index cannot be read, nor made from its shard: which labels that
                one held cannot be known, so no budget covers it.
        """
        numbers = range(len(self.manifest.shards))
        remote = not isinstance(self.manifest.storage, LocalDirectory)
        with ThreadPoolExecutor(_THREADS if remote else 1) as pool:
            parts = list(pool.map(lambda n: map_index(self.manifest, n).labels, numbers))
        stored = np.concatenate([np.zeros(0, np.int32), *parts])
        labels: NDArray[np.int32] = np.array(self._labels, dtype=np.int32)[stored]
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
        except IntegrityError:
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
            self._close_oldest()
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
                if crc32(payload) != index.crc32.item(row, column):
                    raise DamagedError(
                        "checksum", f"its {extension} has changed since the shard was built."
                    )
                members[extension] = payload
        return Sample(index.key(row), self._labels[index.labels.item(row)], members)

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
        try:
            index, file = self._open_files(number)
        except DamagedError as error:
            self._broken[number] = error
            raise
        wanted = tuple(
            (column, extension)
            for column, extension in enumerate(index.extensions)
            if self.wants is None or self.wants(extension)
        )
        self._indexes.pop(number, None)
        shard = self._shards[number] = _Shard(index, file, wanted)
        self._open_bytes += self.manifest.shards[number].filesize
        pinned = self.manifest.storage.pinned_bytes
        while len(self._shards) > 1 and (
            len(self._shards) > self._most_open
            or (pinned is not None and self._open_bytes > pinned)
        ):
            self._close_oldest()
        return shard

    def _open_files(self, number: int) -> tuple[SampleIndex, int]:
        record = self.manifest.shards[number]
        while True:
            try:
                index = self._index(number)
                return index, self.manifest.storage.open(
                    record.url, size=record.filesize, sha256=record.sha256
                )
            except OSError as error:
                # The rest of the program has opened many files: this reader needs fewer.
                if error.errno not in TOO_MANY_FILES or not self._shards:
                    raise UsageError(
                        f"{self.manifest.address}/{record.url} cannot be opened "
                        f"({error.strerror}): raise the limit of open files (ulimit -n)."
                    ) from None
                self._most_open = max(1, len(self._shards) // 2)
                while len(self._shards) > self._most_open:
                    self._close_oldest()

    def _close_oldest(self) -> None:
        number, shard = self._shards.popitem(last=False)
        os.close(shard.file)
        self._open_bytes -= self.manifest.shards[number].filesize


@functools.cache
def _descriptors() -> int:
    """How many files this process may open; the limit is raised as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def _read_at(file: int, offset: int, size: int) -> bytes:
    try:
        payload = os.pread(file, size, offset)
    except OSError as error:
        raise DamagedError("short_read", f"it cannot be read ({error.strerror}).") from None
    if len(payload) != size:
        raise DamagedError("short_read", "the shard ends before its index says.")
    return payload
