"""Writes a teacher's outputs: shards in any order and by any process, then the rest at once."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from cmkd_scale.data.teacher_outputs import (
    COMPLETE,
    MANIFEST,
    SAMPLES,
    OutputsManifest,
    Samples,
    shards_of,
)
from cmkd_scale.errors import UsageError
from cmkd_scale.files import to_json, write_atomically

_log = logging.getLogger(__name__)


def begin(directory: Path, manifest: OutputsManifest) -> None:
    """Make a directory for outputs; shards may be written from then on.

    Raises:
        UsageError: it cannot be written.
    """
    _write(directory / MANIFEST, to_json(manifest.model_dump()))


def left_shards(directory: Path) -> list[int]:
    """Numbers of the shards that an earlier try has left, ascending.

    Removed are files half written, damaged ones, and those that lack a sample, which may be there
    by now. No other process may be writing.
    """
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    found = []
    for number, path in shards_of(directory):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() not in path.name:
            _log.warning("%s is damaged: it is written again", path)
        elif not len(load(content)["missing"]):
            found.append(number)
            continue
        path.unlink()
    return sorted(found)


def write_shard(
    directory: Path, number: int, features: Tensor, logits: Tensor, missing: Tensor
) -> None:
    """Write a shard of n samples, atomically.

    Args:
        directory: that ``begin`` has made.
        number: of the shard.
        features: [n, D] float32
        logits: [n, C] float32
        missing: [m] int64 rows of samples that could not be read, ascending.

    Raises:
        UsageError: it cannot be written.
    """
    content = save({"features": features, "logits": logits, "missing": missing})
    name = f"outputs-{number:06d}-{hashlib.sha256(content).hexdigest()}.safetensors"
    _write(directory / name, content)


def finish(directory: Path, manifest: OutputsManifest, samples: Samples) -> None:
    """Complete a directory that holds all shards.

    Raises:
        UsageError: a shard is not there, or a file cannot be written.
    """
    found = dict(shards_of(directory))
    if len(found) != len(manifest.starts) - 1:
        raise UsageError(
            f"Not every shard that was written is in {directory}: put teacher.cache on a file "
            "system that all machines share."
        )
    encoded = [key.encode() for key in samples.keys]
    content = save(
        {
            "places": samples.places,
            "labels": samples.labels,
            "key_bytes": torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()),
            "key_lengths": torch.tensor([len(key) for key in encoded], dtype=torch.int64),
            "head_weight": samples.head_weight,
            "head_bias": samples.head_bias,
        }
    )
    _write(directory / SAMPLES, content)
    sha256 = {path.name: path.stem.rpartition("-")[2] for path in found.values()}
    sha256[SAMPLES] = hashlib.sha256(content).hexdigest()
    stated = to_json(manifest.model_copy(update={"sha256": sha256}).model_dump())
    _write(directory / MANIFEST, stated)
    _write(directory / COMPLETE, hashlib.sha256(stated).hexdigest().encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error}. Free space or make it writable, and run the same "
            "command again; it goes on with what is there."
        ) from None
