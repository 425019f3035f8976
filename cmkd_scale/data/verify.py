"""Whether all stored data is as it was built: reads every byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmkd_scale.data.manifest import (
    MANIFEST,
    PARTIAL,
    Manifest,
    ShardRecord,
    describe,
    load_manifest,
)
from cmkd_scale.data.sample_index import SampleIndex, read_index
from cmkd_scale.data.shards import UNREADABLE, contradiction, find_manifests
from cmkd_scale.data.tar_walk import index_tar
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError
from cmkd_scale.files import file_digest


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with stored data."""

    path: Path
    reason: str


def verify(root: Path) -> list[Problem]:
    """Everything that is wrong with the finished splits at or below ``root``.

    Reads every byte: digests of shards and indexes, samples and classes against the index,
    the index against the headers of the shard, files that no manifest lists, and unfinished
    builds beside finished splits.

    Raises:
        UsageError: there is no finished split.
    """
    directories = find_manifests(root)
    if not directories:
        raise UsageError(f"There are no shards in {root}: {describe(root)}")
    problems = [
        Problem(path, "an unfinished build; run the same `cmkd shards build` again")
        for pattern in (f"*{PARTIAL}", f"*/*{PARTIAL}")
        for path in sorted(root.glob(pattern))
    ]
    for directory in directories:
        problems += _problems_of_split(directory)
    return problems


def _problems_of_split(directory: Path) -> Iterator[Problem]:
    try:
        manifest = load_manifest(directory)
    except IntegrityError as error:
        yield Problem(directory / MANIFEST, str(error))
        return
    listed = {MANIFEST}
    keys: set[str] = set()
    for shard in manifest.shards:
        listed |= {shard.url, shard.index or shard.url}
        yield from _problems_of_shard(manifest, shard, keys)
    for path in sorted(directory.iterdir()):
        if path.name not in listed:
            yield Problem(path, "the manifest does not list it")


def _problems_of_shard(manifest: Manifest, shard: ShardRecord, keys: set[str]) -> Iterator[Problem]:
    tar = manifest.directory / shard.url
    try:
        os.close(manifest.storage.open(shard.url, size=shard.filesize, sha256=shard.sha256))
        if file_digest(tar) != shard.sha256:
            yield Problem(tar, "its SHA-256 is not that of the manifest")
            return
        found = index_tar(tar)
        reason = contradiction(found, shard, manifest)
        if reason:
            yield Problem(tar, f"contradicts the manifest: {reason}")
        repeated = keys.intersection(found.keys())
        if repeated:
            yield Problem(tar, f"holds {min(repeated)}, which an earlier shard holds too")
        keys.update(found.keys())
    except (CmkdError, OSError) as error:
        yield Problem(tar, str(error))
        return
    if shard.index is not None:
        yield from _problems_of_index(manifest.directory / shard.index, shard, found)


def _problems_of_index(path: Path, shard: ShardRecord, found: SampleIndex) -> Iterator[Problem]:
    try:
        with path.open("rb") as file:
            if read_index(file.fileno(), sha256=shard.index_sha256) != found:
                yield Problem(path, f"does not describe {shard.url}")
    except UNREADABLE as error:
        yield Problem(path, f"is not the sample index of {shard.url} ({error})")
