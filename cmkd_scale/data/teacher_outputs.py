"""What a frozen teacher says of each sample of a split, as files: written once, read by many.

A directory holds shards of features and logits, named by their number and their SHA-256;
``samples.safetensors`` with labels, keys and the teacher's head; ``manifest.json`` with a SHA-256
of each; and COMPLETE, written last, with that of the manifest. Samples have positions, and shards
hold fixed ranges of them, so any process can write any shard. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest

MANIFEST, COMPLETE, SAMPLES = "manifest.json", "COMPLETE", "samples.safetensors"
_SHARD = re.compile(r"outputs-(\d{6})-([0-9a-f]{64})\.safetensors")
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=rf"^({_SHARD.pattern}|samples\.safetensors)$")]


class OutputsManifest(BaseModel):
    """What outputs are of: N samples in S shards."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    fingerprint: dict[str, JsonValue]
    """Of teacher, transform and data, by name."""
    machines: list[int]
    """The kinds of machines that compute the outputs."""
    batch_size: _Count
    """Samples in a forward pass."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """In which it computed."""
    label_names: list[str]
    """[C] of the teacher."""
    feature_dim: _Count
    """D"""
    starts: list[_Count]
    """[S + 1] position of the first sample of each shard, and N."""
    sha256: dict[_FileName, _Digest] = {}
    """Of each file; empty until all are there."""


def read_manifest(directory: Path) -> OutputsManifest | None:
    """The manifest of a directory of outputs, finished or not; None if there is none.

    Raises:
        UsageError: it cannot be read.
        IntegrityError: it is damaged.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    try:
        manifest = OutputsManifest.model_validate_json(content)
        stated = (directory / COMPLETE).read_text() if is_complete(directory) else None
    except (ValidationError, ValueError) as error:
        raise _unusable(directory, f"{MANIFEST}: {str(error).splitlines()[0]}") from None
    if stated not in (None, hashlib.sha256(content).hexdigest()):
        raise _unusable(directory, f"{MANIFEST} does not have the SHA-256 that {COMPLETE} states")
    return manifest


def is_complete(directory: Path) -> bool:
    """Whether all outputs are there."""
    return (directory / COMPLETE).is_file()


@dataclass(frozen=True, slots=True)
class Samples:
    """What is known of the N samples beside the outputs, by position, and the teacher's head."""

    places: Tensor
    """[N] int64 place of each in its split, as its manifest lists the shards."""
    labels: Tensor
    """[N] int64 index into the label names."""
    keys: tuple[str, ...]
    """[N]"""
    head_weight: Tensor
    """[C, D] float32"""
    head_bias: Tensor
    """[C] float32"""


class TeacherOutputs:
    """Finished outputs; features and logits are mapped into memory and read when asked for."""

    def __init__(self, directory: Path) -> None:
        """Open a directory and check every byte of it.

        Raises:
            UsageError: there are no outputs, or they are unfinished.
            IntegrityError: a file is damaged.
        """
        manifest = read_manifest(directory)
        if manifest is None or not is_complete(directory):
            what = "no outputs of a teacher" if manifest is None else "unfinished outputs"
            raise UsageError(
                f"{directory} holds {what}. `cmkd memory --config FILE teacher.run=RUN "
                f"teacher.cache={directory.parent}` writes them, and goes on where it was ended; "
                "on several machines, into a file system that all share."
            )
        self.directory = directory
        self.manifest = manifest
        for name, digest in manifest.sha256.items():
            _check(directory / name, digest)
        try:
            self._open()
        except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
            raise _unusable(directory, str(error)) from None

    def _open(self) -> None:
        directory, manifest = self.directory, self.manifest
        self._starts = np.array(manifest.starts, dtype=np.int64)
        size, width, classes = self._starts[-1], manifest.feature_dim, len(manifest.label_names)
        named = _read(directory / SAMPLES)
        ends = named["key_lengths"].cumsum(0).tolist()
        text = named["key_bytes"].numpy().tobytes()
        keys = tuple(text[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True))
        self.samples = Samples(
            named["places"], named["labels"], keys, named["head_weight"], named["head_bias"]
        )
        self.missing: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)
        """[N] whether a sample could not be read."""
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []
        for number, path in sorted(shards_of(directory, manifest)):
            shard, begin = _read(path), self._starts[number]
            self._features.append(shard["features"])
            self._logits.append(shard["logits"])
            self.missing[begin + shard["missing"].numpy()] = True
        counts = np.diff(self._starts).tolist()
        shapes = [
            *((t.shape, (n, width)) for t, n in zip(self._features, counts, strict=True)),
            *((t.shape, (n, classes)) for t, n in zip(self._logits, counts, strict=True)),
            *((named[name].shape, (size,)) for name in ("places", "labels", "key_lengths")),
            (named["head_weight"].shape, (classes, width)),
            (named["head_bias"].shape, (classes,)),
        ]
        if any(tuple(found) != wanted for found, wanted in shapes):
            raise ValueError("tensors of other shapes than its manifest states")
        if not bool(((named["labels"] >= 0) & (named["labels"] < classes)).all()):
            raise ValueError("impossible labels")

    def __len__(self) -> int:
        """Number of samples N."""
        return int(self._starts[-1])

    def read(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features [n, D] and logits [n, C] of the samples at ``positions`` [n], in that order.

        A sample that is missing has zeros.
        """
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        rows = (positions - self._starts[shards]).tolist()
        pairs = list(zip(shards.tolist(), rows, strict=True))
        if not pairs:
            manifest = self.manifest
            return torch.zeros(0, manifest.feature_dim), torch.zeros(0, len(manifest.label_names))
        return (
            torch.stack([self._features[shard][row] for shard, row in pairs]),
            torch.stack([self._logits[shard][row] for shard, row in pairs]),
        )


def shards_of(
    directory: Path, manifest: OutputsManifest | None = None
) -> Iterator[tuple[int, Path]]:
    """Number and path of each shard: those that a manifest lists, or those that are there."""
    names = manifest.sha256 if manifest else [path.name for path in directory.glob("outputs-*")]
    for name in names:
        found = _SHARD.fullmatch(name)
        if found:
            yield int(found[1]), directory / name


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in set(file.keys())}


def _check(path: Path, digest: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        found = str(error.strerror)
    if found != digest:
        raise IntegrityError(
            f"{path} is damaged: it does not have its SHA-256 ({found}). Remove it and "
            f"{path.with_name(COMPLETE)}, and run `cmkd memory` with this teacher.cache again: "
            "what is missing is computed, what is there is kept."
        )


def _unusable(directory: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"The teacher's outputs in {directory} are damaged ({reason}). Remove that directory and "
        "run `cmkd memory` with this teacher.cache again."
    )
