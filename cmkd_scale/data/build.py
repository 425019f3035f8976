"""Writes the shards of a split: the same bytes each time, and all of them or none.

Work goes on in ``{split}.partial``: each tar and index to a temporary name, synced, renamed,
then recorded in a small JSON file beside it. When all are there the manifest is written and
the directory renamed to ``{split}``. A build that is killed leaves only ``.partial``, which
no reader accepts; run again, it continues after the shards that are recorded.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmkd_scale.data.build_shard import (
    finished,
    open_source,
    write_shard,
    write_shard_in_worker,
)
from cmkd_scale.data.datasets.protocols import Dataset, Split
from cmkd_scale.data.manifest import MANIFEST, PARTIAL, Manifest, ShardRecord, load_manifest
from cmkd_scale.data.plan import make_manifest, make_plan, plan_of, refuse_other_plan
from cmkd_scale.data.shards import lost_shards, map_index
from cmkd_scale.data.workers import context
from cmkd_scale.errors import UsageError
from cmkd_scale.files import read_json, sync, to_json, write_atomically

_PLAN = "plan.json"


def build(
    dataset: Dataset,
    out: Path,
    *,
    modality: str,
    split: str,
    samples_per_shard: int,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write ``out/{modality}/{split}``, or return what is there if it was built as asked.

    Args:
        dataset: where the samples come from.
        out: directory that may hold several modalities.
        modality: one of the data set's.
        split: one of the data set's.
        samples_per_shard: samples in a tar; the last one may hold fewer.
        workers: processes that write shards; 0 or 1 writes them here. The bytes are the same.
        progress: called with (samples done, samples in all) now and then.

    Raises:
        UsageError: ``out`` holds shards built with other options, or cannot be written.
        IntegrityError: ``out`` holds damaged shards.
    """
    if samples_per_shard < 1:
        raise UsageError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more.")
    source = dataset.open(modality, split)
    plan = make_plan(
        source,
        dataset=dataset.name,
        modality=modality,
        split=split,
        samples_per_shard=samples_per_shard,
    )
    final = out / modality / split
    try:
        with _locked(final) as partial:
            if not final.exists():
                job = _Job(source, (dataset, modality, split), workers)
                _write_split(job, partial, final, plan, progress)
    except OSError as error:
        raise UsageError(f"Shards cannot be written to {final}: {error}.") from error
    manifest = load_manifest(final)
    refuse_other_plan(plan, plan_of(manifest), final)
    for number in range(len(manifest.shards)):
        map_index(manifest, number)  # digests of the indexes; `verify` reads the rest
    for _, lost in lost_shards(manifest):
        raise lost
    progress(len(source), len(source))
    return manifest


@contextmanager
def _locked(final: Path) -> Iterator[Path]:
    """Hold the ``.partial`` directory of a split, alone; another build waits for this one."""
    partial = final.with_name(final.name + PARTIAL)
    while True:
        if final.exists():
            yield partial
            return
        partial.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # renamed just now by the build that made it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The build that held it may have renamed it to its final name by now.
            if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
                yield partial
                return
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Job:
    """Where samples come from, here and in workers."""

    source: Split
    arguments: tuple[Dataset, str, str]
    """Data set, modality and split, from which a worker opens a source of its own."""
    workers: int


def _write_split(
    job: _Job,
    partial: Path,
    final: Path,
    plan: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    if (partial / MANIFEST).exists():  # killed between the manifest and the rename
        ours = read_json(partial / MANIFEST).get("cmkd", {})
        refuse_other_plan(plan, {key: ours.get(key) for key in plan}, partial)
    else:
        if (partial / _PLAN).exists():
            refuse_other_plan(plan, read_json(partial / _PLAN), partial)
        write_atomically(partial / _PLAN, to_json(plan))
        records = _write_shards(job, partial, plan, progress)
        write_atomically(partial / MANIFEST, to_json(make_manifest(plan, records)))
    for path in [*partial.glob("shard-*.json"), partial / _PLAN]:
        path.unlink(missing_ok=True)
    os.rename(partial, final)
    sync(final.parent)


def _write_shards(
    job: _Job, partial: Path, plan: dict[str, Any], progress: Callable[[int, int], None]
) -> list[ShardRecord]:
    total, step = plan["samples"], plan["samples_per_shard"]
    parts = {
        f"shard-{number:06d}": range(start, min(start + step, total))
        for number, start in enumerate(range(0, total, step))
    }
    records = {name: finished(partial, name) for name in parts}
    missing = [name for name, record in records.items() if record is None]
    done = total - sum(len(parts[name]) for name in missing)
    progress(done, total)
    workers = min(job.workers, len(missing))
    if workers < 2:
        for name in missing:
            records[name] = write_shard(job.source, partial, name, parts[name])
            done += len(parts[name])
            progress(done, total)
        return [record for record in records.values() if record is not None]
    with ProcessPoolExecutor(
        workers,
        mp_context=context(),
        initializer=open_source,
        initargs=(os.getpid(), *job.arguments),
    ) as pool:
        futures = {
            pool.submit(write_shard_in_worker, partial, name, parts[name]): name for name in missing
        }
        try:
            for future in as_completed(futures):
                records[futures[future]] = future.result()
                done += len(parts[futures[future]])
                progress(done, total)
        except BaseException:
            # Shards that are begun are finished; a build that is run again goes on after them.
            pool.shutdown(cancel_futures=True)
            raise
    return [record for record in records.values() if record is not None]
