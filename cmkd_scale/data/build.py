"""Writes the shards of a split: the same bytes each time, and all of them or none.

Work goes on in ``{split}.partial``: each tar and index to a temporary name, synced, renamed,
then recorded in a small JSON file beside it. When all are there the manifest is written and
the directory renamed to ``{split}``. A build that is killed leaves only ``.partial``, which
no reader accepts; run again, it continues after the shards that are recorded.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmkd_scale.data.datasets.protocols import Dataset, Split
from cmkd_scale.data.manifest import MANIFEST, PARTIAL, Manifest, ShardRecord, load_manifest
from cmkd_scale.data.plan import make_manifest, make_plan, plan_of, refuse_other_plan
from cmkd_scale.data.sample_index import index_bytes, index_tar
from cmkd_scale.data.shards import load_index
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest, read_json, sync, to_json, write_atomically
from cmkd_scale.records import UNLABELLED, Sample

_PLAN = "plan.json"
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with an extension it must fit a USTAR header


def build(
    dataset: Dataset,
    out: Path,
    *,
    modality: str,
    split: str,
    samples_per_shard: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write ``out/{modality}/{split}``, or return what is there if it was built as asked.

    Args:
        dataset: where the samples come from.
        out: directory that may hold several modalities.
        modality: one of the data set's.
        split: one of the data set's.
        samples_per_shard: samples in a tar; the last one may hold fewer.
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
                _write_split(source, partial, final, plan, progress)
    except OSError as error:
        raise UsageError(f"Shards cannot be written to {final}: {error}.") from error
    manifest = load_manifest(final)
    refuse_other_plan(plan, plan_of(manifest), final)
    load_index(manifest)  # sizes and index digests: cheap, and `verify` reads the rest
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


def _write_split(
    source: Split,
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
        records = _write_shards(source, partial, plan, progress)
        write_atomically(partial / MANIFEST, to_json(make_manifest(plan, records)))
    for path in [*partial.glob("shard-*.json"), partial / _PLAN]:
        path.unlink(missing_ok=True)
    os.rename(partial, final)
    sync(final.parent)


def _write_shards(
    source: Split, partial: Path, plan: dict[str, Any], progress: Callable[[int, int], None]
) -> list[ShardRecord]:
    records = []
    total, step = plan["samples"], plan["samples_per_shard"]
    for number, start in enumerate(range(0, total, step)):
        stop = min(start + step, total)
        name = f"shard-{number:06d}"
        record = _finished(partial, name)
        if record is None:
            record = _write_shard(source, partial, name, range(start, stop), progress)
        records.append(record)
        progress(stop, total)
    return records


def _finished(partial: Path, name: str) -> ShardRecord | None:
    """The record of a shard that is there, unharmed; None if it has to be made."""
    path = partial / f"{name}.json"
    if not path.exists():
        return None
    try:
        record = ShardRecord(**read_json(path))
        whole = (
            file_digest(partial / record.url) == record.sha256
            and file_digest(partial / str(record.index)) == record.index_sha256
        )
    except (OSError, TypeError, IntegrityError):
        return None
    return record if whole else None


def _write_shard(
    source: Split,
    partial: Path,
    name: str,
    places: range,
    progress: Callable[[int, int], None],
) -> ShardRecord:
    from webdataset import TarWriter

    tar, index_path = partial / f"{name}.tar", partial / f"{name}.index.safetensors"
    temporary = partial / f".{name}.tar.tmp"
    counts: Counter[str] = Counter()
    with temporary.open("wb") as file:
        with TarWriter(file, mtime=0, encoder=False) as writer:
            for place in places:
                sample = source[place]
                writer.write(_members(sample, len(source.label_names)))
                if sample.label != UNLABELLED:
                    counts[source.label_names[sample.label]] += 1
                progress(place + 1, len(source))
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, tar)
    index = index_tar(tar)
    if len(index) != len(places):
        raise ValueError(f"{len(places)} samples from {places.start} on share keys")
    write_atomically(index_path, index_bytes(index))
    record = ShardRecord(
        url=tar.name,
        nsamples=len(index),
        filesize=tar.stat().st_size,
        sha256=file_digest(tar),
        index=index_path.name,
        index_sha256=file_digest(index_path),
        class_counts=dict(sorted(counts.items())),
    )
    write_atomically(partial / f"{name}.json", to_json(asdict(record)))
    return record


def _members(sample: Sample, classes: int) -> dict[str, Any]:
    """What a tar writer takes; a sample that readers would misread is a fault of its adapter."""
    label = sample.members.get("cls")
    stated = str(sample.label).encode() if sample.label != UNLABELLED else None
    if not _KEY.fullmatch(sample.key) or label != stated or sample.label >= classes:
        raise ValueError(
            f"sample '{sample.key}' has label {sample.label} and cls {label!r}; keys take "
            "letters, digits, _ and -, and cls holds the label in ASCII"
        )
    return {"__key__": sample.key, **sample.members}
