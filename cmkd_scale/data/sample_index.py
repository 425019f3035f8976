"""Where each sample lies inside its shard, so that any sample is one positioned read away.

The index of a shard is a safetensors file of integers, a few dozen bytes a sample; that of
a split is their concatenation.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save

from cmkd_scale.errors import IntegrityError
from cmkd_scale.records import UNLABELLED

FORMAT_VERSION = 1

_DTYPES = {
    "offset": np.dtype(np.int64),
    "size": np.dtype(np.int64),
    "label": np.dtype(np.int32),
    "key_bytes": np.dtype(np.uint8),
    "key_offset": np.dtype(np.int64),
}
_LONGEST_LABEL = 20  # bytes of a cls member


@dataclass(frozen=True, slots=True, eq=False)
class SampleIndex:
    """Places of N samples with up to M members each."""

    extensions: tuple[str, ...]
    """M file extensions without their first dot, sorted."""
    offset: NDArray[np.int64]
    """[N, M] byte in the shard at which a member's payload begins; -1: no such member."""
    size: NDArray[np.int64]
    """[N, M] bytes of a member's payload; -1: no such member."""
    labels: NDArray[np.int32]
    """[N] index into the label names, or ``UNLABELLED``."""
    shard: NDArray[np.int32]
    """[N] position of the sample's shard in the manifest."""
    key_bytes: NDArray[np.uint8]
    """All keys in UTF-8, one after the other."""
    key_offset: NDArray[np.int64]
    """[N + 1] where each key begins in ``key_bytes``."""

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        """Whether the same samples lie at the same places."""
        return (
            isinstance(other, SampleIndex)
            and self.extensions == other.extensions
            and all(
                np.array_equal(getattr(self, name), getattr(other, name))
                for name in ("offset", "size", "labels", "shard", "key_bytes", "key_offset")
            )
        )

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        return bytes(self.key_bytes[self.key_offset[i] : self.key_offset[i + 1]]).decode()

    def keys(self) -> Iterator[str]:
        """All keys in stored order."""
        return (self.key(i) for i in range(len(self)))


def index_tar(path: Path) -> SampleIndex:
    """Walk through the headers of a WebDataset tar.

    Neighbouring files that share their name up to the first dot are one sample, as in
    WebDataset. The label is the integer in ``cls``, where there is one.

    Raises:
        IntegrityError: not a tar, or one that holds something else than samples.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    labels: list[int] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                directory, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = directory + slash + stem
                if not extension or not stem:
                    raise ValueError(f"'{member.name}' is not named KEY.EXTENSION")
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                    labels.append(UNLABELLED)
                if extension in samples[-1][1]:
                    raise ValueError(f"'{member.name}' occurs twice")
                samples[-1][1][extension] = (member.offset_data, member.size)
                if extension == "cls":
                    labels[-1] = _read_label(tar, member)
        return _from_samples(samples, labels)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"{path} is not a readable WebDataset shard: {error}. Build or copy it again."
        ) from None


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = tar.extractfile(member)
    text = file.read(_LONGEST_LABEL) if file else b""
    if member.size > _LONGEST_LABEL or not text.strip().isdigit():
        raise ValueError(f"'{member.name}' does not hold a class index")
    label = int(text)
    if label > np.iinfo(np.int32).max:
        raise ValueError(f"'{member.name}' holds the impossible class index {label}")
    return label


def _from_samples(
    samples: Sequence[tuple[str, dict[str, tuple[int, int]]]], labels: Sequence[int]
) -> SampleIndex:
    extensions = tuple(sorted({name for _, members in samples for name in members}))
    places = np.full((len(samples), len(extensions), 2), -1, dtype=np.int64)
    for i, (_, members) in enumerate(samples):
        for name, place in members.items():
            places[i, extensions.index(name)] = place
    encoded = [key.encode() for key, _ in samples]
    return SampleIndex(
        extensions=extensions,
        offset=np.ascontiguousarray(places[..., 0]),
        size=np.ascontiguousarray(places[..., 1]),
        labels=np.array(labels, dtype=np.int32),
        shard=np.zeros(len(samples), dtype=np.int32),
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_offset=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )


def index_bytes(index: SampleIndex) -> bytes:
    """The file of one shard's index; equal indexes give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {
        "offset": index.offset,
        "size": index.size,
        "label": index.labels,
        "key_bytes": index.key_bytes,
        "key_offset": index.key_offset,
    }
    # One key only: safetensors writes several in an order that changes from run to run.
    about = {"extensions": index.extensions, "format_version": FORMAT_VERSION}
    return save(arrays, metadata={"cmkd": json.dumps(about, sort_keys=True)})


def read_index(path: Path) -> SampleIndex:
    """Read what ``index_bytes`` wrote.

    Raises:
        IntegrityError: the file is something else.
    """
    try:
        arrays, about = _read_safetensors(path)
        extensions = tuple(about["extensions"])
        if about["format_version"] != FORMAT_VERSION or not all(
            isinstance(name, str) for name in extensions
        ):
            raise ValueError("another format version")
        index = SampleIndex(
            extensions=extensions,
            offset=arrays["offset"],
            size=arrays["size"],
            labels=arrays["label"],
            shard=np.zeros(len(arrays["label"]), dtype=np.int32),
            key_bytes=arrays["key_bytes"],
            key_offset=arrays["key_offset"],
        )
        _check(index, {name: array.dtype for name, array in arrays.items()})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is not a sample index ({error}); build the shards again."
        ) from None
    return index


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["cmkd"])
    if not isinstance(about, dict):
        raise TypeError("its metadata is not an object")
    return arrays, about


def _check(index: SampleIndex, dtypes: dict[str, np.dtype[Any]]) -> None:
    """Refuse arrays that do not fit together: a reader indexes with them unchecked."""
    shape = (len(index), len(index.extensions))
    if dtypes != _DTYPES or index.labels.ndim != 1 or len(set(index.extensions)) != shape[1]:
        raise ValueError("other arrays")
    if index.offset.shape != shape or index.size.shape != shape:
        raise ValueError("arrays of other shapes")
    if ((index.offset < 0) != (index.size < 0)).any() or (index.labels < UNLABELLED).any():
        raise ValueError("impossible places or labels")
    ends = index.key_offset
    if (
        ends.shape != (len(index) + 1,)
        or ends[0] != 0
        or ends[-1] != len(index.key_bytes)
        or (np.diff(ends) <= 0).any()
    ):
        raise ValueError("impossible keys")
    bytes(index.key_bytes).decode()


def concatenate(parts: Sequence[SampleIndex]) -> SampleIndex:
    """The index of a split from those of its shards, in the order of the manifest."""
    extensions = tuple(sorted({name for part in parts for name in part.extensions}))
    total = sum(map(len, parts))
    offset = np.full((total, len(extensions)), -1, dtype=np.int64)
    size = np.full_like(offset, -1)
    start = 0
    for part in parts:
        columns = [extensions.index(name) for name in part.extensions]
        offset[start : start + len(part), columns] = part.offset
        size[start : start + len(part), columns] = part.size
        start += len(part)
    lengths = np.concatenate([[0], *(np.diff(part.key_offset) for part in parts)])
    return SampleIndex(
        extensions=extensions,
        offset=offset,
        size=size,
        labels=np.concatenate([np.zeros(0, np.int32), *(part.labels for part in parts)]),
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts]),
        key_bytes=np.concatenate([np.zeros(0, np.uint8), *(part.key_bytes for part in parts)]),
        key_offset=np.cumsum(lengths, dtype=np.int64),
    )
