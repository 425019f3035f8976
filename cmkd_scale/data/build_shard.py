"""Writes one shard of a split: its tar, its sample index, and what is known of both."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cmkd_scale.data.datasets.protocols import Dataset, Split
from cmkd_scale.data.manifest import ShardRecord
from cmkd_scale.data.sample_index import index_bytes, is_known
from cmkd_scale.data.tar_walk import index_tar
from cmkd_scale.data.workers import bind_to
from cmkd_scale.errors import IntegrityError
from cmkd_scale.files import file_digest, read_json, to_json, write_atomically
from cmkd_scale.records import UNLABELLED, Sample

_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")  # with an extension it must fit a USTAR header

_source: Split | None = None
"""What this process builds from, if it is a worker: opened once, since that may take long."""


def open_source(builder: int, dataset: Dataset, modality: str, split: str) -> None:
    """Make this process one that ``write_shard_in_worker`` runs in."""
    global _source
    bind_to(builder)
    _source = dataset.open(modality, split)


def write_shard_in_worker(partial: Path, name: str, places: range) -> ShardRecord:
    """See ``write_shard``."""
    assert _source is not None
    return write_shard(_source, partial, name, places)


def finished(partial: Path, name: str) -> ShardRecord | None:
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


def write_shard(source: Split, partial: Path, name: str, places: range) -> ShardRecord:
    """Write tar, index and record of the samples ``places`` into ``partial``.

    Raises:
        ValueError: a sample is one that readers would misread: a fault of its adapter.
    """
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
    unknown = [name for name in sample.members if not is_known(name)]
    if unknown:
        raise ValueError(f"sample '{sample.key}' has members of unknown types: {unknown}")
    label = sample.members.get("cls")
    stated = str(sample.label).encode() if sample.label != UNLABELLED else None
    if not _KEY.fullmatch(sample.key) or label != stated or sample.label >= classes:
        raise ValueError(
            f"sample '{sample.key}' has label {sample.label} and cls {label!r}; keys take "
            "letters, digits, _ and -, and cls holds the label in ASCII"
        )
    return {"__key__": sample.key, **sample.members}
