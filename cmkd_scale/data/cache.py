"""Files fetched from elsewhere, kept on local disk by digest and shared by all who need them.

``SHA256`` is a finished file: complete, synced and verified before it got that name.
``SHA256.part`` is one being fetched; whoever holds the exclusive lock of ``SHA256.lock``
appends to it, the others wait for that lock (not for one of the file itself, which its
readers may keep for hours). The kernel drops the locks of a killed process, so what it had
fetched is continued by the next. Readers hold a shared lock as long as they have a finished
file open, so that eviction passes it by.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cmkd_scale.data.damage import DamagedError
from cmkd_scale.errors import UsageError
from cmkd_scale.files import sync

_log = logging.getLogger(__name__)

_ENTRY = re.compile(r"[0-9a-f]{64}(\.part|\.lock)?")
_RESTARTS = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNFIT = (errno.ENOTDIR, errno.EEXIST, errno.ENOLCK, errno.EOPNOTSUPP)
_warned: set[Path] = set()


class Partial:
    """A file being fetched: appended to by one process, hashed on the way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self.size = 0
        """Bytes reached; fetching continues here."""
        while block := os.pread(descriptor, 1 << 20, self.size):
            self._hash.update(block)
            self.size += len(block)

    def write(self, data: bytes) -> None:
        """Append."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, self.size)
            self._hash.update(rest[:written])
            self.size += written
            rest = rest[written:]

    def restart(self) -> None:
        """Discard all bytes."""
        os.ftruncate(self._descriptor, 0)
        self._hash = hashlib.sha256()
        self.size = 0

    def digest(self) -> str:
        """SHA-256 of the bytes so far."""
        return self._hash.hexdigest()


Fetch = Callable[[Partial], None]
"""Appends to a ``Partial``, from its ``size`` on, until the file is complete."""


@dataclass(frozen=True, slots=True)
class ShardCache:
    """Content-addressed files on local disk, shared by threads and processes of one machine."""

    root: Path
    """Created when it is first needed. Files in it that are not ours are left alone."""
    limit_bytes: int
    """Of all files together, fetched or being fetched. Those in use are never removed, so these
    alone may exceed it; so may files that several processes are fetching at the same time,
    until the last of them is complete."""

    def open(self, sha256: str, *, size: int | None, address: str, fetch: Fetch) -> int:
        """A descriptor, for reading, of the file with this digest.

        Its digest was verified when the file was added; here its size is compared. The file is
        kept from eviction until the descriptor and all that a fork made of it are closed.

        Args:
            sha256: hexadecimal digest of the content.
            size: bytes of the content, or None where they are not known.
            address: where the file comes from, for messages.
            fetch: called by one thread of one process of the machine at a time; again, from
                the start, if what it fetched has another digest.

        Raises:
            UsageError: the cache cannot be written, or the disk is full.
            DamagedError: what was fetched has another size or digest, repeatedly.
        """
        with _explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = self._finished(sha256, size)
                if descriptor is None:
                    with self._partial(sha256) as partial:
                        # Whoever had the lock before may have finished the file, or given up.
                        if partial is not None:
                            descriptor = self._finished(sha256, size)
                            if descriptor is None:
                                self._add(sha256, size, address, fetch, partial)
                                descriptor = self._finished(sha256, size)
                if descriptor is not None:
                    return descriptor

    def _finished(self, sha256: str, size: int | None) -> int | None:
        """A locked descriptor of the finished file, or None: it is missing or has another size."""
        path = self.root / sha256
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                named = _is_at(descriptor, path)  # False: evicted or replaced before the lock
                if named and size in (None, os.fstat(descriptor).st_size):
                    with contextlib.suppress(OSError):  # read-only, or another user's
                        os.utime(descriptor)
                    return os.dup(descriptor)  # shares the lock
            finally:
                os.close(descriptor)
            if named:
                return None

    @contextlib.contextmanager
    def _partial(self, sha256: str) -> Iterator[int | None]:
        """A locked descriptor of the partial file; None: another process dealt with it."""
        path, lock = self.root / f"{sha256}.part", self.root / f"{sha256}.lock"
        with _locked(lock, os.O_RDWR | os.O_CREAT) as turn:
            if not _is_at(turn, lock):
                yield None
                return
            try:
                # Nobody waits for this one; it keeps eviction off, also as a finished file.
                with _locked(path, os.O_RDWR | os.O_CREAT) as descriptor:
                    if not _is_at(descriptor, path):
                        yield None
                        return
                    try:
                        yield descriptor
                    finally:
                        if _is_at(descriptor, path) and os.fstat(descriptor).st_size == 0:
                            path.unlink()
            finally:
                lock.unlink()

    def _add(
        self, sha256: str, size: int | None, address: str, fetch: Fetch, descriptor: int
    ) -> None:
        """Complete a partial file whose lock is held, verify it and give it its name."""
        partial = Partial(descriptor)
        for _ in range(1 + _RESTARTS):
            if size is not None and partial.size > size:
                partial.restart()
            self._evict(0 if size is None else size - partial.size)
            fetch(partial)
            if partial.digest() == sha256 and size in (None, partial.size):
                os.fsync(descriptor)
                os.rename(self.root / f"{sha256}.part", self.root / sha256)
                sync(self.root)
                self._evict(0)
                # Not released: it must not be evicted before the caller has opened it.
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                return
            found = f"{partial.size} bytes with SHA-256 {partial.digest()}"
            partial.restart()
        expected = f"{'?' if size is None else size} bytes with SHA-256 {sha256}"
        raise DamagedError(
            "wrong_shard",
            f"{address}: the server's file is not what the manifest states: {found}, instead of "
            f"{expected}. Upload the whole directory again.",
        )

    def _evict(self, wanted: int) -> None:
        """Remove least recently used files until ``wanted`` more bytes are within the limit."""
        # Two processes that evict at once would both remove what one has to.
        with _locked(self.root, os.O_RDONLY):
            entries = []
            for entry in os.scandir(self.root):
                if _ENTRY.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # renamed since
                        stat = entry.stat()
                        age = stat.st_mtime_ns if stat.st_size else 0
                        entries.append((age, stat.st_size, Path(entry.path)))
            excess = sum(size for _, size, _ in entries) + wanted - self.limit_bytes
            for _, size, path in sorted(entries):
                if excess <= 0:
                    return
                # The lock of a killed process goes like any other file.
                if _remove_unused(path):
                    excess -= size
        if excess > 0 and self.root not in _warned:
            _warned.add(self.root)
            text = "the files in use in %s exceed data.cache_limit_bytes=%d by %d bytes"
            _log.warning(text, self.root, self.limit_bytes, excess)


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody holds a lock on it."""
    try:
        with _locked(path, os.O_RDONLY, fcntl.LOCK_NB) as descriptor:
            named = _is_at(descriptor, path)
            if named:
                path.unlink()
            return named
    except (BlockingIOError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _locked(path: Path, flags: int, wait: int = 0) -> Iterator[int]:
    """A descriptor with the exclusive lock of a file or directory; ``wait``: 0 or LOCK_NB."""
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
        try:
            yield descriptor
        finally:
            # Closing alone would leave it locked by a child that was forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name: it may have been removed or replaced."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    """What the file system of the cache refuses, as an error with a remedy."""
    choose = "set CMKD_CACHE to a directory on a local disk."
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            remedy = f"lower data.cache_limit_bytes, free space, or {choose}"
        elif error.errno in _REFUSED:
            remedy = f"make it writable, or {choose}"
        elif error.errno in _UNFIT:
            remedy = choose
        else:
            raise
        raise UsageError(f"The cache {root} cannot be used ({error.strerror}): {remedy}") from None
