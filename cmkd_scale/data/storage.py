"""Where the files of a split lie: in a local directory, or behind a URL with a local cache."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cmkd_scale.data.damage import DamagedError

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
"""Error numbers that say nothing about the file itself."""


class Storage(Protocol):
    """The directory of a split. Can be sent to other processes."""

    @property
    def address(self) -> str:
        """For messages: a path, or a URL without secrets."""

    @property
    def retries(self) -> int:
        """Transfers that this object had to try again in this process."""

    @property
    def pinned_bytes(self) -> int | None:
        """How much of it one reader may keep open, where that takes up room; None: any."""

    def open(self, name: str, *, size: int | None, sha256: str) -> int:
        """A descriptor of a file for reading, which the caller closes.

        Args:
            name: of the file.
            size: bytes it must have, if known.
            sha256: its digest: checked when a file is copied, not when it is opened here.

        Raises:
            DamagedError: it is missing or has another size or digest.
            IntegrityError: its server cannot be reached.
            OSError: too many files are open.
        """


@dataclass(frozen=True, slots=True)
class LocalDirectory:
    """A directory of this machine or of a file system that it mounts."""

    path: Path
    retries: int = 0
    pinned_bytes: int | None = None

    @property
    def address(self) -> str:
        """The path."""
        return str(self.path)

    def open(self, name: str, *, size: int | None, sha256: str) -> int:
        """See ``Storage``."""
        try:
            # Not waiting for a writer, should this be a pipe.
            file = os.open(self.path / name, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise
            raise DamagedError(
                "missing_shard",
                f"{self.path / name} cannot be opened ({error.strerror}); build or copy it again.",
            ) from None
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode) or size not in (None, state.st_size):
            os.close(file)
            raise DamagedError(
                "wrong_shard",
                f"{self.path / name} has {state.st_size} bytes instead of {size}, or is no file; "
                "build or copy it again.",
            )
        return file
