"""Saving a run: what every rank does for a checkpoint, and what becomes of writes that fail."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.training.checkpoint_writer import CheckpointWriter, Written
from cmkd_scale.training.step_log import StepLog

_log = logging.getLogger(__name__)


class Saving:
    """Checkpoints of a run: rank 0 writes them, beside training."""

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        max_failures: int,
        blobs: Mapping[str, bytes],
        log: StepLog,
    ) -> None:
        """Save nothing yet.

        Args:
            directory: of the checkpoints.
            keep: newest ones that are kept.
            max_failures: writes in a row that may fail before ``fault`` says so.
            blobs: files stored in each checkpoint as they are.
            log: told of durations and failures.
        """
        self.max_failures = max_failures
        self.blobs = dict(blobs)
        self.log = log
        self.fault: UsageError | None = None
        """On rank 0, once too many writes have failed: the run should end."""
        self._writer = CheckpointWriter(directory, keep=keep) if distributed.is_main() else None
        self._failures = 0  # in a row
        self._last: UsageError | None = None  # failure, if the last write was one

    def save(
        self, state: Mapping[str, Any], files: Mapping[str, Iterable[tuple[str, Tensor]]]
    ) -> None:
        """Begin a checkpoint; a collective call. Training may go on while rank 0 writes it.

        Args:
            state: plain values.
            files: file -> names and whole tensors; each item may be a collective call.
        """
        if self._writer is None:
            for tensors in files.values():
                for _ in tensors:
                    pass  # rank 0 takes them
            return
        self._note(self._writer.wait())
        self._writer.start(state, files, self.blobs)

    def look(self) -> None:
        """Take in whether a write has ended; waits for nothing."""
        if self._writer is not None:
            self._note(self._writer.outcome())

    def wait(self) -> None:
        """Until no write is under way here."""
        if self._writer is not None:
            self._note(self._writer.wait())

    def settle(self) -> None:
        """Wait until the last checkpoint is complete; a collective call.

        Raises:
            UsageError: it could not be written.
        """

        def wait() -> None:
            self.wait()
            if self._last is not None:
                raise self._last

        distributed.run_on_main(wait)

    def _note(self, written: Written | None) -> None:
        if written is None:
            return
        self._last = written.error
        if written.error is None:
            self._failures = 0
            self.log.set("checkpoint_seconds", written.seconds)
            self.log.set("checkpoint_stall_seconds", written.stall_seconds)
            return
        self._failures += 1
        self.log.count("checkpoint_failures", 1)
        if self._failures > self.max_failures:
            self.fault = written.error
        else:
            _log.warning("%s The run goes on and tries again.", written.error)
