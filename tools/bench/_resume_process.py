"""What ``resume.py`` runs in fresh processes: ``first`` or ``memory``, a split, an argument."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.data.modalities import TextModality
from cmkd_scale.data.order import Order
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.records import Batch

BATCH, READ = 256, 2_000
MIB = 1 << 20


def make_loader(directory: Path, state: Mapping[str, Any] | None, workers: int) -> TrainLoader:
    """All that a run opens of its data."""
    manifest = load_manifest(directory)
    reader = SampleReader(manifest, TextModality().wants)
    loader = TrainLoader(
        reader,
        TextModality(),
        Order(Natural(len(reader)), reader.starts, seed=0),
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        augment=False,
        workers=workers,
    )
    if state is not None:
        loader.load_state(state)
    return loader


def first_batch(directory: Path, state: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds to the first batch in this process, which has opened nothing yet."""
    wall, cpu = time.perf_counter(), time.process_time()
    loader = make_loader(directory, state, workers=0)
    batches = loader.batches()
    next(batches)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    _close(loader, batches)
    return seconds


def memory(directory: Path, workers: int) -> dict[str, float]:
    """MiB that READ batches, an epoch at most, add to this process or, after one, to its worker."""
    process = psutil.Process()
    before = _memory(process)
    manifest = load_manifest(directory)
    found = {"manifest": _memory(process)["private"] - before["private"]}
    del manifest
    loader = make_loader(directory, None, workers)
    batches = loader.batches()
    next(batches)
    if workers:
        process = next(
            child for child in process.children(recursive=True) if _memory(child)["index"]
        )
        before = _memory(process)
    for _ in islice(batches, min(READ, len(loader.order) // BATCH)):
        pass
    after = _memory(process)
    _close(loader, batches)
    return found | {"private": after["private"] - before["private"], "index": after["index"]}


def _memory(process: psutil.Process) -> dict[str, float]:
    """MiB: private to the process without the indexes, and indexes that it has mapped.

    Pages of a mapped file belong to the page cache: all processes share them, but while only
    one has them mapped the kernel counts them as private.
    """
    index = [m for m in process.memory_maps() if m.path.endswith(".index.safetensors")]
    private = process.memory_full_info().uss - sum(m.private_clean for m in index)
    return {"private": private / MIB, "index": sum(m.rss for m in index) / MIB}


def _close(loader: TrainLoader, batches: Iterator[Batch]) -> None:
    batches.close()  # type: ignore[attr-defined]
    loader.decoder.reader.close()


def main() -> None:
    """Print what the named action finds, as JSON."""
    action, directory, argument = sys.argv[1:]
    torch.set_num_threads(1)
    if action == "memory":
        found = memory(Path(directory), int(argument))
    else:
        found = first_batch(Path(directory), json.loads(argument) if argument else None)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
