"""Where each sample lies inside its shard, so that any sample is one positioned read away.

The index of a shard is a safetensors file of integers beside it, about a hundred bytes a
sample. It is mapped into memory, so that the processes of a machine share one copy of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

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
_LONGEST_HEADER = 1 << 16  # bytes


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
    # By torch, since Python's own mapping would keep a descriptor, of which there are few.
    try:
        mapped = torch.from_file(f"/dev/fd/{file}", shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:  # the file is open, so what lacks is one more descriptor
        raise OSError(errno.EMFILE, str(error)) from None
    content = mapped.numpy()
    content.flags.writeable = False
    if sha256 is not None and hashlib.sha256(content.data).hexdigest() != sha256:
        raise ValueError("its SHA-256 is not that of the manifest")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header has an impossible length")
    header = json.loads(content[8 : 8 + length].tobytes())
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
