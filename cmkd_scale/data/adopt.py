"""Makes WebDataset tars of another origin readable here: an index beside each, and a manifest.

The tars are read once and stay as they are.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cmkd_scale.data.manifest import FILE_NAME, MANIFEST, Manifest, ShardRecord, load_manifest
from cmkd_scale.data.plan import make_manifest
from cmkd_scale.data.sample_index import index_bytes
from cmkd_scale.data.tar_walk import index_tar
from cmkd_scale.data.workers import bind_to, context
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest, to_json, write_atomically


def adopt(
    directory: Path,
    *,
    name: str,
    modality: str,
    split: str,
    label_names: Sequence[str] | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Index all tars of a directory and write its manifest.

    Args:
        directory: holds ``*.tar``; indexes and manifest are written into it.
        name: of the data set.
        modality: one of ``MODALITIES``.
        split: e.g. "train".
        label_names: what the class indices in the ``cls`` members mean, or None for their
            digits.
        workers: processes that read; 0 or 1 reads here.
        progress: called with (shards done, shards in all).

    Raises:
        UsageError: there are no tars, there is a manifest already, the directory cannot be
            written, or a label has no name.
        IntegrityError: a tar is damaged or holds something else than samples; two hold a
            sample of the same key.
    """
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise UsageError(f"There are no shards (*.tar) in {directory}.")
    odd = [tar.name for tar in tars if not FILE_NAME.fullmatch(tar.name)]
    if odd:
        raise UsageError(
            f"'{odd[0]}' in {directory}: names of shards take letters, digits, '.', '_' and '-'; "
            "rename it."
        )
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory} has a {MANIFEST} already; remove it to index anew.")
    try:
        if workers < 2:
            indexed = _index_all(tars, map, progress)
        else:
            pool: Executor
            with ProcessPoolExecutor(
                workers, mp_context=context(), initializer=bind_to, initargs=(os.getpid(),)
            ) as pool:
                indexed = _index_all(tars, partial(pool.map, chunksize=1), progress)
        largest = max((label for _, counts, _ in indexed for label in counts), default=-1)
        names = label_names or [str(label) for label in range(largest + 1)]
        if largest >= len(names):
            raise UsageError(f"The shards hold class {largest}, and {len(names)} names are given.")
        _refuse_repeated_keys(tars, [keys for _, _, keys in indexed])
        records = [
            ShardRecord(**record, class_counts={names[k]: n for k, n in sorted(counts.items())})
            for record, counts, _ in indexed
        ]
        plan = {
            "dataset": name,
            "modality": modality,
            "split": split,
            "samples": sum(record.nsamples for record in records),
            "samples_per_shard": max(record.nsamples for record in records),
            "label_names": list(names),
            "options": {},
            "format_version": 1,
        }
        write_atomically(directory / MANIFEST, to_json(make_manifest(plan, records)))
    except OSError as error:
        raise UsageError(f"Indexes cannot be written to {directory}: {error}.") from error
    return load_manifest(directory)


_Indexed = tuple[dict[str, Any], dict[int, int], list[int]]


def _index_all(
    tars: Sequence[Path],
    apply: Callable[..., Any],
    progress: Callable[[int, int], None],
) -> list[_Indexed]:
    indexed: list[_Indexed] = []
    for one in apply(_index_one, tars):
        indexed.append(one)
        progress(len(indexed), len(tars))
    return indexed


def _index_one(tar: Path) -> _Indexed:
    """Write the index of one tar; what the manifest says of it, its classes, hashes of its keys."""
    index = index_tar(tar)
    path = tar.with_name(f"{tar.stem}.index.safetensors")
    write_atomically(path, index_bytes(index))
    record = {
        "url": tar.name,
        "nsamples": len(index),
        "filesize": tar.stat().st_size,
        "sha256": file_digest(tar),
        "index": path.name,
        "index_sha256": file_digest(path),
    }
    counts = Counter(index.labels[index.labels >= 0].tolist())
    return record, counts, list(map(_hash_of_key, index.keys()))


def _hash_of_key(key: str) -> int:
    """64 bits of a key, the same in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _refuse_repeated_keys(tars: Sequence[Path], keys: Sequence[Sequence[int]]) -> None:
    every = np.concatenate([np.array(part, dtype=np.uint64) for part in keys])
    ordered = np.sort(every)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        key = int(repeated[0])
        holders = [tar.name for tar, part in zip(tars, keys, strict=True) if key in part]
        raise IntegrityError(
            f"A key occurs twice in {', '.join(holders)}: keys must be unique in a split."
        )
