"""What is on disk: splits, and the sample index of their shards.

A split is a directory of plain WebDataset tars, a sample index beside each of them, and a
manifest. ``build.py`` writes it; nothing in here writes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cmkd_scale.data.damage import DamagedError
from cmkd_scale.data.manifest import (
    MANIFEST,
    PARTIAL,
    REMEDY,
    Manifest,
    ShardRecord,
    describe,
    load_manifest,
)
from cmkd_scale.data.sample_index import SampleIndex, read_index
from cmkd_scale.data.storage import TOO_MANY_FILES, LocalDirectory
from cmkd_scale.data.tar_walk import index_open_tar
from cmkd_scale.errors import IntegrityError, UsageError, did_you_mean

__all__ = [
    "Manifest",
    "SampleIndex",
    "ShardRecord",
    "find_manifests",
    "load_manifest",
    "lost_shards",
    "map_index",
    "resolve",
]


_log = logging.getLogger(__name__)


def find_manifests(root: Path) -> list[Path]:
    """Directories of finished splits: ``root`` itself or below it, at most two levels, sorted."""
    found = {
        path.parent
        for pattern in (MANIFEST, f"*/{MANIFEST}", f"*/*/{MANIFEST}")
        for path in root.glob(pattern)
    }
    return sorted(
        path
        for path in found
        if not any(part.endswith(PARTIAL) for part in (path.name, path.parent.name))
    )


def resolve(root: Path, *, split: str, modality: str | None = None) -> Path:
    """The directory of one split.

    Args:
        root: what was given to ``--out`` (holding one modality, or ``modality`` named), the
            directory of a modality, or that of a split.
        split: its name.
        modality: its name, or None where there is one only.

    Raises:
        UsageError: naming what is there.
    """
    choices = {path: load_manifest(path) for path in find_manifests(root)}
    if not choices:
        raise UsageError(f"There are no shards in {root}: {describe(root)}")
    modalities = sorted({manifest.modality for manifest in choices.values()})
    if modality is None and len(modalities) > 1:
        raise UsageError(
            f"{root} holds several modalities ({', '.join(modalities)}): name one "
            "(data.modality, --modality), or give its directory."
        )
    wanted = modality or modalities[0]
    if wanted not in modalities:
        raise UsageError(f"{root} holds no modality '{wanted}': {did_you_mean(wanted, modalities)}")
    named = {
        manifest.split: path for path, manifest in choices.items() if manifest.modality == wanted
    }
    if split not in named:
        interrupted = [path for path in root.glob(f"**/{split}{PARTIAL}") if path.is_dir()]
        if interrupted:
            raise UsageError(f"The build of {interrupted[0]} was interrupted: run it again.")
        raise UsageError(
            f"{root} holds no split '{split}' of {wanted}: {did_you_mean(split, named)} Build it "
            f"with `cmkd shards build ... --modality {wanted} --split {split}`."
        )
    return named[split]


def map_index(manifest: Manifest, number: int) -> SampleIndex:
    """Where the samples of one shard lie.

    An index that is missing or damaged is made again in memory from the shard, whose digest
    must then be right.

    Raises:
        DamagedError: that cannot be done, or the index contradicts the manifest.
    """
    record, storage = manifest.shards[number], manifest.storage
    try:
        if record.index is None or record.index_sha256 is None:
            raise ValueError("there is none")
        file = storage.open(record.index, size=None, sha256=record.index_sha256)
        try:
            index = read_index(file, sha256=record.index_sha256)
        finally:
            os.close(file)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in TOO_MANY_FILES:
            raise
        index = _walk(manifest, record, error)
    reason = contradiction(index, record, manifest)
    if reason:
        raise DamagedError(
            "wrong_index",
            f"The sample index of {manifest.address}/{record.url} contradicts its manifest: "
            f"{reason}. {REMEDY}",
        )
    return index


UNREADABLE = (
    DamagedError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What a file of other content than expected may raise; not what an outage raises."""


def _walk(manifest: Manifest, record: ShardRecord, cause: Exception) -> SampleIndex:
    name = f"{manifest.address}/{record.url}"
    if record.index is not None:
        _log.warning("the sample index of %s cannot be used (%s); reading the shard", name, cause)
    # Closed by the file object that is made of it.
    file = manifest.storage.open(record.url, size=record.filesize, sha256=record.sha256)
    with os.fdopen(file, "rb") as tar:
        if hashlib.file_digest(tar, "sha256").hexdigest() != record.sha256:
            raise DamagedError(
                "wrong_shard",
                f"{name} is not what its manifest says (its SHA-256 differs). {REMEDY}",
            )
        tar.seek(0)
        try:
            return index_open_tar(tar, name)
        except IntegrityError as error:
            raise DamagedError("wrong_shard", str(error)) from None


def contradiction(index: SampleIndex, shard: ShardRecord, manifest: Manifest) -> str:
    """What index and manifest disagree on, or nothing."""
    if len(index) != shard.nsamples:
        return f"{len(index)} samples instead of {shard.nsamples}"
    if (index.offset > shard.filesize - index.size).any():
        return "a sample ends behind the end of the file"
    if int(index.labels.max(initial=-1)) >= len(manifest.label_names):
        return "a label without a name"
    counts = np.bincount(index.labels[index.labels >= 0])
    stated = {name: count for name, count in shard.class_counts.items() if count}
    if {manifest.label_names[label]: counts[label] for label in np.flatnonzero(counts)} != stated:
        return "other class counts"
    return ""


def lost_shards(manifest: Manifest) -> Iterator[tuple[int, DamagedError]]:
    """Number of each local shard that is missing or has another size, and what is wrong."""
    if not isinstance(manifest.storage, LocalDirectory):
        return  # nobody asks a server for thousands of files before the first step
    for number, record in enumerate(manifest.shards):
        try:
            size, sha256 = record.filesize, record.sha256
            os.close(manifest.storage.open(record.url, size=size, sha256=sha256))
        except DamagedError as error:
            yield number, error
