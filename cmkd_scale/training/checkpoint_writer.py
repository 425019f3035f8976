"""Checkpoints that are written beside training: it waits for a copy in memory, no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.training.checkpoint import Checkpoint, directory_of, save_checkpoint


@dataclass(frozen=True, slots=True)
class Written:
    """How the write of a checkpoint has ended."""

    step: int
    path: Path
    seconds: float
    """From its beginning to its end."""
    stall_seconds: float
    """That training waited."""
    error: UsageError | None
    """Why there is none; earlier ones are as they were."""


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread; used by one rank."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Write nothing yet.

        Args:
            directory: of the checkpoints.
            keep: newest ones that are kept.
        """
        self.directory = directory
        self.keep = keep
        # Kept from one save to the next: memory that is touched for the first time costs more
        # than the copy itself.
        self._buffers: dict[str, dict[str, Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._written: Written | None = None

    def start(
        self,
        state: Mapping[str, Any],
        files: Mapping[str, Iterable[tuple[str, Tensor]]],
        blobs: Mapping[str, bytes],
    ) -> None:
        """Copy all tensors and begin to write; there must be no write under way.

        Args:
            state: plain values; ``step`` names the checkpoint.
            files: file -> names and tensors, on any device, each taken once and in order. They
                may change as soon as this returns.
            blobs: file -> content that is stored as it is.
        """
        assert self._thread is None, "wait for the write under way first"
        begun = time.perf_counter()
        self._buffers = {
            file: self._copied(self._buffers.get(file, {}), tensors)
            for file, tensors in files.items()
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies from a device run beside the program
        checkpoint = Checkpoint(state=dict(state), files=self._buffers, blobs=dict(blobs))
        stall = time.perf_counter() - begun
        self._thread = threading.Thread(
            target=self._write, args=(checkpoint, begun, stall), name="checkpoint"
        )
        self._thread.start()

    def outcome(self) -> Written | None:
        """How a write has ended since the last call; None while there is none, or it goes on."""
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Written | None:
        """How the write under way ends; None if there is none."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        written, self._written = self._written, None
        return written

    def _copied(
        self, before: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Copies of tensors, in the buffers that there have been ``before`` where they fit."""
        copies = {}
        for name, tensor in tensors:
            buffer = before.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
                )
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, checkpoint: Checkpoint, begun: float, stall: float) -> None:
        error = None
        try:
            save_checkpoint(self.directory, checkpoint, keep=self.keep)
        except UsageError as failure:
            error = failure
        except Exception as failure:  # a thread has nobody to tell
            error = UsageError(
                f"The checkpoint cannot be written: {failure!r}. This is a fault of the program; "
                "earlier checkpoints are untouched."
            )
        self._written = Written(
            step=int(checkpoint.state["step"]),
            path=directory_of(self.directory, checkpoint.state),
            seconds=time.perf_counter() - begun,
            stall_seconds=stall,
            error=error,
        )
