"""Makes the index of a tar by walking through it, without trust in what it holds."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cmkd_scale.data.sample_index import MEMBER_TYPES, SampleIndex, is_known
from cmkd_scale.errors import IntegrityError
from cmkd_scale.records import UNLABELLED

_LONGEST_LABEL = 20  # bytes of a cls member
_READ = 1 << 20  # bytes at a time
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates: what was not UTF-8


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
