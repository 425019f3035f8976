"""Fetches the shards that a rank will need soon, while it reads others."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import OrderedDict
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.storage import LocalDirectory
from cmkd_scale.data.stream import SampleReader

AHEAD = 16_384
"""Samples, of all ranks; of shards of 1,000 about 16."""

_THREADS = 4
_REMEMBERED = 1024  # shards; one that is wanted again after so many others is fetched again


class Prefetch:
    """Brings remote shards into the local cache ahead of their use; local ones are left alone."""

    def __init__(self, reader: SampleReader) -> None:
        """Fetch nothing yet."""
        self.useful = not isinstance(reader.manifest.storage, LocalDirectory)
        """Whether there is anything to fetch."""
        self._reader = reader
        self._asked: OrderedDict[int, None] = OrderedDict()
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._done = False

    def __enter__(self) -> Prefetch:
        """Start the threads; daemons, since a transfer that hangs must not outlive the program."""
        for number in range(_THREADS if self.useful else 0):
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

    def want(self, places: NDArray[np.int64]) -> None:
        """The samples at ``places`` [n] will be read soon, in that order."""
        if not self.useful:
            return
        shards = np.searchsorted(self._reader.starts, places, side="right") - 1
        for shard in dict.fromkeys(shards.tolist()):
            if shard not in self._asked:
                self._wanted.put(shard)
            self._asked[shard] = None
            self._asked.move_to_end(shard)
        while len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)

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
