"""Reads a remote file, and again in a child process, and again here: URL CACHE METHOD."""

from __future__ import annotations

import multiprocessing
import pickle  # noqa: TID251 - what a spawned worker does with its arguments
import sys
from pathlib import Path
from typing import Any

from cmkd_scale.data.cache import ShardCache
from cmkd_scale.data.remote import RemoteDirectory


def read(directory: RemoteDirectory) -> bytes | None:
    return directory.read("manifest.json", max_bytes=10)


def read_in_child(directory: RemoteDirectory, results: Any) -> None:
    results.put((read(directory), directory.retries))


def main(url: str, cache: str, method: str) -> None:
    directory = RemoteDirectory(url, ShardCache(Path(cache), 1 << 30), backoff_seconds=0.001)
    assert read(directory) == b"{}"
    assert directory.retries == 1
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=read_in_child, args=(directory, results))
    child.start()
    assert results.get(timeout=60)[0] == b"{}"
    child.join()
    assert child.exitcode == 0
    assert read(directory) == b"{}"  # the parent's connection lives
    copied = pickle.loads(pickle.dumps(directory))
    assert (copied.address, copied.retries) == (directory.address, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
