"""Fetches the shards that a rank will need soon, while it reads others."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from types import TracebackType

import numpy as np

from cmkd_scale.data.order import Order, rank_positions
from cmkd_scale.data.storage import LocalDirectory
from cmkd_scale.data.stream import SampleReader

_AHEAD = 16_384  # positions of the order; of shards of 1,000 samples about 16
_THREADS = 4


class Prefetch:
    """Brings remote shards into the local cache ahead of their use; local ones are left alone."""

    def __init__(self, reader: SampleReader, order: Order, rank: int, world_size: int) -> None:
        """Fetch nothing yet."""
        self._reader = reader
        self._order = order
        self._share = rank, world_size
        self._reached = -1
        self._asked: tuple[int, set[int]] = (-1, set())
        self._remote = not isinstance(reader.manifest.storage, LocalDirectory)
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done = False

    def __enter__(self) -> Prefetch:
        """Start the threads; daemons, since a transfer that hangs must not outlive the program."""
        for number in range(_THREADS if self._remote else 0):
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Begin no further transfer."""
        self._done = True
        for _ in range(_THREADS):
            self._wanted.put(-1)  # wakes a thread

    def reached(self, start: int, stop: int) -> None:
        """Reading has reached the samples ``start`` to ``stop`` of the endless sequence."""
        if not self._remote:
            return
        begin = start if self._reached < 0 else self._reached
        self._reached = stop + _AHEAD
        counts = np.array(rank_positions(begin, self._reached, *self._share), dtype=np.int64)
        shards = np.searchsorted(self._reader.starts, self._order.places(counts), "right") - 1
        epochs = counts // len(self._order)
        # In the order of their use, each once an epoch.
        for epoch, shard in dict.fromkeys(zip(epochs.tolist(), shards.tolist(), strict=True)):
            if epoch != self._asked[0]:
                self._asked = (epoch, set())
            if shard not in self._asked[1]:
                self._asked[1].add(shard)
                self._wanted.put(shard)

    def _work(self) -> None:
        storage = self._reader.manifest.storage
        while True:
            number = self._wanted.get()
            if self._done:
                return
            record = self._reader.manifest.shards[number]
            # What cannot be had now is met again, and reported, when it is read.
            with contextlib.suppress(Exception):
                os.close(storage.open(record.url, size=record.filesize, sha256=record.sha256))
