"""Where each sample lies inside its shard, so that any sample is one positioned read away.

The index of a shard is a safetensors file of integers beside it, about a hundred bytes a
sample. It is mapped into memory, so that the processes of a machine share one copy of it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cmkd_scale.errors import IntegrityError
from cmkd_scale.records import UNLABELLED

FORMAT_VERSION = 2

MEMBER_TYPES = frozenset({"cls", "json", "txt", "npy", "jpg", "jpeg", "png", "webp", "wav", "flac"})
"""What a member may be: the end of its name, in front of which a number may count frames."""

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "offset": ("I64", np.dtype("<i8")),
    "size": ("I64", np.dtype("<i8")),
    "crc32": ("U32", np.dtype("<u4")),
    "labels": ("I32", np.dtype("<i4")),
    "key_bytes": ("U8", np.dtype("u1")),
    "key_offset": ("I64", np.dtype("<i8")),
}
_LONGEST_LABEL = 20  # bytes of a cls member
_LONGEST_HEADER = 1 << 16  # bytes
_READ = 1 << 20  # bytes at a time
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates: what was not UTF-8


def is_known(extension: str) -> bool:
    """Whether a member with this extension is data: ``jpg``, or ``007.jpg`` for a frame."""
    number, dot, last = extension.rpartition(".")
    return last in MEMBER_TYPES and (not dot or number.isdigit())


@dataclass(frozen=True, slots=True, eq=False)
class SampleIndex:
    """Places of the n samples of a shard with up to M members each."""

    extensions: tuple[str, ...]
    """M file extensions without their first dot, sorted."""
    offset: NDArray[np.int64]
    """[n, M] byte in the shard at which a member's payload begins; -1: no such member."""
    size: NDArray[np.int64]
    """[n, M] bytes of a member's payload; -1: no such member."""
    crc32: NDArray[np.uint32]
    """[n, M] checksum of a member's payload (ISO 3309, as in zlib); 0: no such member."""
    labels: NDArray[np.int32]
    """[n] index into the label names, or ``UNLABELLED``."""
    key_bytes: NDArray[np.uint8]
    """All keys in UTF-8, one after the other."""
    key_offset: NDArray[np.int64]
    """[n + 1] where each key begins in ``key_bytes``."""

    def __len__(self) -> int:
        """Number of samples n."""
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        """Whether the same samples lie at the same places."""
        return (
            isinstance(other, SampleIndex)
            and self.extensions == other.extensions
            and all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _DTYPES)
        )

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        begin, end = self.key_offset.item(i), self.key_offset.item(i + 1)
        return self.key_bytes[begin:end].tobytes().decode()

    def keys(self) -> Iterator[str]:
        """All keys in stored order."""
        return (self.key(i) for i in range(len(self)))


def index_tar(path: Path) -> SampleIndex:
    """See ``index_open_tar``."""
    try:
        with path.open("rb") as file:
            return index_open_tar(file, str(path))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error}).") from None


def index_open_tar(file: BinaryIO, name: str) -> SampleIndex:
    """Walk through a WebDataset tar and read all of it, for the checksums.

    Neighbouring files that share their name up to the first dot are one sample, as in
    WebDataset. The label is the integer in ``cls``, where there is one.

    Args:
        file: at its beginning.
        name: for the message.

    Raises:
        IntegrityError: not a tar, or one that holds something else than samples.
    """
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
    labels: list[int] = []
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.isdir():
                    continue
                key, extension = _split_name(member)
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                    labels.append(UNLABELLED)
                if extension in samples[-1][1]:
                    raise ValueError(f"'{member.name}' occurs twice")
                crc = _checksum(file.fileno(), member)
                samples[-1][1][extension] = (member.offset_data, member.size, crc)
                if extension == "cls":
                    labels[-1] = _read_label(file.fileno(), member)
            _check_end(file.fileno(), tar.offset)
        return _from_samples(samples, labels)
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise _unreadable(name, str(error)) from None
    except RecursionError:
        raise _unreadable(name, "it has extended headers without end") from None


def _unreadable(name: str, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{name} is not a readable WebDataset shard: {reason}. Build or copy it again."
    )


class _Headers:
    """What ``tarfile`` reads to walk; it would make room for as much as any header claims."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if size > _READ:
            raise ValueError(f"it has an extended header of {size} bytes")
        return self._file.read(size)


def _split_name(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and extension of a member, or ValueError if it must not be there."""
    if not member.isreg() or member.issparse():
        raise ValueError(f"'{member.name}' is a link or a device, not a file")
    if member.size < 0:  # tarfile would go back, maybe for ever
        raise ValueError(f"'{member.name}' has the impossible size {member.size}")
    if _UNPRINTABLE.search(member.name):
        raise ValueError(f"{member.name!r} is not a name in printable UTF-8")
    directory, slash, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if member.name.startswith("/") or ".." in directory.split("/"):
        raise ValueError(f"'{member.name}' points out of the shard")
    if not extension or not stem:
        raise ValueError(f"'{member.name}' is not named KEY.EXTENSION")
    if not is_known(extension):
        raise ValueError(
            f"'{member.name}' is of an unknown type; members are {', '.join(sorted(MEMBER_TYPES))}"
        )
    return directory + slash + stem, extension


def _checksum(file: int, member: tarfile.TarInfo) -> int:
    crc, done = 0, 0
    while done < member.size:
        part = os.pread(file, min(_READ, member.size - done), member.offset_data + done)
        if not part:
            raise ValueError(f"it ends inside '{member.name}'")
        crc = zlib.crc32(part, crc)
        done += len(part)
    return crc


def _check_end(file: int, end: int) -> None:
    """Refuse a tar without its end: tarfile stops at the first header that it cannot read."""
    done = end
    while part := os.pread(file, _READ, done):
        if part.count(0) < len(part):
            raise ValueError(f"what follows byte {end} is neither a member nor the end of a tar")
        done += len(part)
    if done - end < tarfile.BLOCKSIZE:
        raise ValueError("its end is missing")


def _read_label(file: int, member: tarfile.TarInfo) -> int:
    text = os.pread(file, min(member.size, _LONGEST_LABEL), member.offset_data)
    if member.size > _LONGEST_LABEL or not text.strip().isdigit():
        raise ValueError(f"'{member.name}' does not hold a class index")
    label = int(text)
    if label > np.iinfo(np.int32).max:
        raise ValueError(f"'{member.name}' holds the impossible class index {label}")
    return label


def _from_samples(
    samples: Sequence[tuple[str, dict[str, tuple[int, int, int]]]], labels: Sequence[int]
) -> SampleIndex:
    extensions = tuple(sorted({name for _, members in samples for name in members}))
    shape = (len(samples), len(extensions))
    offset, size = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    crc32 = np.zeros(shape, dtype=np.uint32)
    for i, (_, members) in enumerate(samples):
        for name, place in members.items():
            column = extensions.index(name)
            offset[i, column], size[i, column], crc32[i, column] = place
    encoded = [key.encode() for key, _ in samples]
    if len(set(encoded)) != len(encoded):
        key = next(key for key, times in Counter(encoded).items() if times > 1)
        raise ValueError(f"the key '{key.decode()}' occurs twice, with others in between")
    return SampleIndex(
        extensions=extensions,
        offset=offset,
        size=size,
        crc32=crc32,
        labels=np.array(labels, dtype=np.int32),
        key_bytes=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        key_offset=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )


def index_bytes(index: SampleIndex) -> bytes:
    """The file of one shard's index; equal indexes give equal bytes."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in _DTYPES}
    # One key only: safetensors writes several in an order that changes from run to run.
    about = {"extensions": index.extensions, "format_version": FORMAT_VERSION}
    return save(arrays, metadata={"cmkd": json.dumps(about, sort_keys=True)})


def read_index(file: int, *, sha256: str | None = None) -> SampleIndex:
    """Map what ``index_bytes`` wrote into memory.

    Read by hand where safetensors would copy, or take a millisecond for each file; there may
    be thousands.

    Args:
        file: a descriptor, which the caller closes; the index lives on.
        sha256: digest that the file must have.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """
    size = os.fstat(file).st_size
    if size < 8:
        raise ValueError("it is too short")
    content = mmap.mmap(file, size, access=mmap.ACCESS_READ)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its SHA-256 is not that of the manifest")
    length = int.from_bytes(content[:8], "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header has an impossible length")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["cmkd"])
    if about["format_version"] != FORMAT_VERSION:
        raise ValueError("it is of another version of this program; build the shards again")
    arrays = {}
    for name, (stated, dtype) in _DTYPES.items():
        entry = header[name]
        begin, end = entry["data_offsets"]
        count = (end - begin) // dtype.itemsize
        if entry["dtype"] != stated or not 0 <= begin <= end <= size - 8 - length:
            raise ValueError("other arrays")
        array = np.frombuffer(content, dtype, count=count, offset=8 + length + begin)
        arrays[name] = array.reshape(entry["shape"])
    index = SampleIndex(extensions=tuple(about["extensions"]), **arrays)
    _check(index)
    return index


def _check(index: SampleIndex) -> None:
    """Refuse arrays that do not fit together: a reader indexes with them unchecked."""
    shape = (len(index), len(index.extensions))
    if index.labels.ndim != 1 or len(set(index.extensions)) != shape[1]:
        raise ValueError("other arrays")
    if any(array.shape != shape for array in (index.offset, index.size, index.crc32)):
        raise ValueError("arrays of other shapes")
    if not all(isinstance(name, str) and is_known(name) for name in index.extensions):
        raise ValueError(f"members of unknown types: {index.extensions}")
    if ((index.offset < 0) != (index.size < 0)).any() or (index.labels < UNLABELLED).any():
        raise ValueError("impossible places or labels")
    ends = index.key_offset
    if (
        ends.shape != (len(index) + 1,)
        or index.key_bytes.ndim != 1
        or ends[0] != 0
        or ends[-1] != len(index.key_bytes)
        or (ends[1:] <= ends[:-1]).any()
        or (index.key_bytes[ends[:-1]] & 0xC0 == 0x80).any()  # inside of a character
        or (index.key_bytes < 0x20).any()  # a line break, say
    ):
        raise ValueError("impossible keys")
    bytes(index.key_bytes).decode()
