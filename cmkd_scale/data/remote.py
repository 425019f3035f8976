"""Directories of shards on a server, read through a local cache.

A file is fetched by one request at a time, and several files at once by threads of the
caller. A transfer that fails is continued at the byte reached, by this process or the next.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cmkd_scale.data import transport
from cmkd_scale.data.cache import Partial, ShardCache
from cmkd_scale.data.damage import DamagedError
from cmkd_scale.data.remote_address import (
    CREDENTIALS,
    SCHEMES,
    is_bare,
    is_remote,
    parse_address,
)
from cmkd_scale.data.transport import Failure, Missing, Refused
from cmkd_scale.errors import IntegrityError, UsageError

__all__ = ["SCHEMES", "RemoteDirectory", "is_remote"]

_MIN_CHUNK = 64 << 10
_MAX_WAIT_SECONDS = 30.0
_ROUNDS = 50
_PATIENT_ATTEMPTS = 26  # with pauses of up to 30 s: about ten minutes
_PARTS = 64  # of the cache, for each of the processes that share it
_LONG_SECONDS = 4.0

_Result = TypeVar("_Result")
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class _Sink(Protocol):
    """Where the bytes of a file go."""

    size: int

    def write(self, data: bytes) -> None: ...


class _Memory:
    """The bytes of a small file."""

    def __init__(self, address: str, max_bytes: int) -> None:
        self.data = bytearray()
        self.size = 0
        self._address, self._max_bytes = address, max_bytes

    def write(self, data: bytes) -> None:
        self.data += data
        self.size = len(self.data)
        if self.size > self._max_bytes:
            raise IntegrityError(
                f"{self._address} has more than {self._max_bytes} bytes, too many for what it "
                "should be: give the address of a directory of shards."
            )


class RemoteDirectory:
    """A directory on a server: cheap to make, picklable, for use by threads and after a fork.

    It connects when it is first used, once per process. Credentials come from where the tools
    of the scheme look for them. With ``http(s)://`` alone they may be in the address, and are
    then sent with every request: ``USER:PASSWORD@``, or a query that signs a whole directory.
    They never appear in a message.
    """

    def __init__(
        self,
        url: str,
        cache: ShardCache,
        *,
        attempts: int = 6,
        timeout_seconds: float = 30.0,
        backoff_seconds: float = 0.5,
        chunk_bytes: int = 8 << 20,
    ) -> None:
        """Say where the directory is; nothing is asked of the server.

        Args:
            url: address of the directory, of one of ``SCHEMES``.
            cache: keeps what is opened.
            attempts: failures in a row, with no byte received, that end a transfer.
            timeout_seconds: after which an attempt has failed: without a byte, or with s3 and
                gs without a whole chunk. Each failure halves the chunk, for slow connections.
            backoff_seconds: wait after the first failure; doubled by each, up to 30 s.
            chunk_bytes: size of a request to s3 and gs. Others send a file in one response.

        Raises:
            UsageError: the address is not of a supported kind, or a package is missing.
        """
        self._where = parse_address(url)
        self.address = self._where.shown
        """For messages, without credentials."""
        self.retries = 0
        """Transfers that this object had to try again; its copies start at 0."""
        self._cache = cache
        self._attempts = attempts
        self._timeout = timeout_seconds
        self._backoff = backoff_seconds
        self._chunk = chunk_bytes
        self.pinned_bytes = cache.limit_bytes // _PARTS
        """What one reader may keep open, and so in the cache."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "retries": 0}

    def __repr__(self) -> str:
        return f"RemoteDirectory({self.address!r})"

    def patient(self) -> RemoteDirectory:
        """The same, for a run of weeks: an outage of ten minutes does not end it."""
        patient = copy.copy(self)
        patient._attempts = _PATIENT_ATTEMPTS
        return patient

    def child(self, name: str) -> RemoteDirectory:
        """A sub-directory.

        Raises:
            UsageError: the name is not a bare one.
        """
        child = copy.copy(self)
        child.address = self._address(name)
        child._where = self._where.child(name)
        return child

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """A small file whole, not cached; None if it does not exist.

        Raises:
            UsageError: the name is not a bare one, or the server refuses access.
            IntegrityError: the file is larger than ``max_bytes``, or transfers keep failing.
        """
        memory = _Memory(self._address(name), max_bytes)
        try:
            self._transfer(name, memory, None)
        except Missing:
            return None
        return bytes(memory.data)

    def open(self, name: str, *, size: int | None, sha256: str) -> int:
        """A descriptor of the local copy, fetched and verified if need be; the caller closes it.

        Args:
            name: bare name of the file.
            size: its bytes, or None where they are not known.
            sha256: its digest.

        Raises:
            UsageError: the name is not a bare one, the server refuses access, or the cache
                cannot be written.
            DamagedError: the file is missing or not what size and digest say.
            IntegrityError: transfers keep failing.
        """
        address = self._address(name)

        def fetch(partial: Partial) -> None:
            self._transfer(name, partial, size)

        try:
            return self._cache.open(sha256, size=size, address=address, fetch=fetch)
        except Missing:
            raise DamagedError(
                "missing_shard",
                f"{address} is missing on the server, though the manifest lists it: upload the "
                "whole directory again.",
            ) from None

    def directories(self) -> list[str]:
        """Names of the sub-directories, sorted; none where the server cannot list (HTTP).

        Raises:
            UsageError: the server refuses access.
            IntegrityError: requests keep failing.
        """
        if self._where.scheme in ("https", "http"):
            return []

        def attempt(_failures: int) -> list[str]:
            return transport.directories(self._where.base, timeout_seconds=self._timeout)

        try:
            names = self._persist(attempt, self.address, lambda: 0)
        except Missing:
            return []
        return sorted(name for name in set(names) if is_bare(name))

    def _address(self, name: str) -> str:
        if not is_bare(name):
            raise UsageError(f"{self.address}: {name!r} is not the bare name of a file in it.")
        return f"{self.address}/{name}"

    def _transfer(self, name: str, sink: _Sink, size: int | None) -> None:
        """Append to a sink what the file has from ``sink.size`` on."""

        def attempt(failures: int) -> None:
            if (start := sink.size) == size:
                return
            source = transport.pieces(
                self._where.file(name),
                start=start,
                end=size,
                timeout_seconds=self._timeout,
                chunk_bytes=max(min(self._chunk, _MIN_CHUNK), self._chunk >> failures),
            )
            with contextlib.closing(source):
                for piece in source:
                    sink.write(piece)
            # Nothing at all: the file ends here, and its digest will tell.
            if size is not None and start < sink.size < size:
                raise Failure(f"the transfer ended after {sink.size} of {size} bytes")

        self._persist(attempt, self._address(name), lambda: sink.size)

    def _persist(
        self, attempt: Callable[[int], _Result], address: str, reached: Callable[[], int]
    ) -> _Result:
        """Attempt until it succeeds, as long as bytes arrive; told the failures without any."""
        failures, reason = 0, ""
        # Also bounded where a little arrives each time.
        for _ in range(self._attempts * _ROUNDS):
            before = reached()
            try:
                return attempt(failures)
            except Failure as failure:
                reason = str(failure)
            except Refused as refusal:
                raise UsageError(
                    f"{address}: access is refused ({refusal}), or it does not exist: check the "
                    f"address and your credentials: {CREDENTIALS[self._where.scheme]}."
                ) from None
            failures = 0 if reached() > before else failures + 1
            if failures == self._attempts:
                break
            with _lock:
                self.retries += 1
            wait = min(_MAX_WAIT_SECONDS, self._backoff * 2 ** min(30, max(0, failures - 1)))
            if wait >= _LONG_SECONDS:
                _log.warning("%s: %s; trying again in %.0f s", address, reason, wait)
            time.sleep(wait * random.uniform(0.5, 1))
        raise IntegrityError(
            f"{address} could not be read: {reason}. {failures} attempts in a row brought nothing: "
            "check the server and the network, and start again; what has arrived is kept."
        )
