"""Ways to save a state, for ``checkpoint.py``: what training waits for, and what may go on."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.staging import (  # noqa: TID251
    AsyncStager,
    DefaultStager,
    StagingOptions,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save  # noqa: TID251

from cmkd_scale.files import sync
from cmkd_scale.models.encoders import ByteTransformer
from cmkd_scale.models.model import Model
from cmkd_scale.training.backends import Replicated
from cmkd_scale.training.checkpoint_writer import CheckpointWriter
from cmkd_scale.training.engine import MODEL_FILE, OPTIMIZER_FILE
from cmkd_scale.training.parameter_groups import parameter_groups

Files = dict[str, dict[str, Tensor]]
"""File of a checkpoint -> name -> tensor."""


def make_state(width: int, depth: int) -> Files:
    """Weights of a transformer, and AdamW's moments after a step, as a run has them.

    Args:
        width: hidden width.
        depth: layers; each has 12 x width^2 weights.
    """
    torch.manual_seed(0)
    encoder = ByteTransformer(max_bytes=512, width=width, depth=depth)
    model = Model(encoder, encoder_dim=width, feature_dim=256, classes=1000)
    groups = parameter_groups(model, model, weight_decay=0.05, layer_decay=1.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        MODEL_FILE: {name: value.detach() for name, value in model.state_dict().items()},
        OPTIMIZER_FILE: dict(Replicated(model, optimizer, model).optimizer_state()),
    }


def flat(files: Files) -> dict[str, Tensor]:
    """All tensors in one dictionary, for the ways that take only one."""
    return {f"{file}:{name}": value for file, part in files.items() for name, value in part.items()}


def size_in_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of all values."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


class Way(Protocol):
    """One way to save; ``start`` and ``finish`` are called in turns."""

    def start(self) -> None:
        """What training waits for."""
        ...

    def finish(self) -> None:
        """Wait until the files are complete and on the disk.

        Raises:
            RuntimeError: they could not be written.
        """
        ...

    def clear(self) -> None:
        """Remove what was written."""
        ...


class Copy:
    """The floor: each tensor is copied into a buffer that was touched before, and that is all."""

    def __init__(self, files: Files) -> None:
        """Make the buffers."""
        self.pairs = [(value, value.clone()) for value in flat(files).values()]

    def start(self) -> None:
        """See ``Way``."""
        for value, buffer in self.pairs:
            buffer.copy_(value)

    def finish(self) -> None:
        """See ``Way``; nothing is written."""

    def clear(self) -> None:
        """See ``Way``."""


class Memmove(Copy):
    """The same by libc, which keeps more of it in the caches than torch does."""

    def __init__(self, copy: Copy) -> None:
        """Use the buffers of ``copy``."""
        self.pairs = copy.pairs

    def start(self) -> None:
        """See ``Way``."""
        for value, buffer in self.pairs:
            size = value.numel() * value.element_size()
            ctypes.memmove(buffer.data_ptr(), value.data_ptr(), size)


class Ours:
    """``CheckpointWriter``: hashed, synced, read back."""

    def __init__(self, files: Files, directory: Path, *, first: bool = False) -> None:
        """Write below ``directory``; if ``first``, every save is the first one of its writer."""
        self._files, self._directory, self._first = files, directory, first
        self._steps = itertools.count(1)
        self.writer = CheckpointWriter(directory, keep=1)

    def start(self) -> None:
        """See ``Way``."""
        files: dict[str, Iterator[tuple[str, Tensor]]] = {
            file: iter(tensors.items()) for file, tensors in self._files.items()
        }
        self.writer.start({"step": next(self._steps)}, files, {})

    def finish(self) -> None:
        """See ``Way``."""
        written = self.writer.wait()
        if written is not None and written.error is not None:
            raise RuntimeError(str(written.error))

    def clear(self) -> None:
        """See ``Way``."""
        shutil.rmtree(self._directory)
        if self._first:
            self.writer = CheckpointWriter(self._directory, keep=1)


class OneFile:
    """``torch.save``, or safetensors' ``save_file``: training waits for all of it but the sync."""

    def __init__(self, files: Files, path: Path, *, safetensors: bool) -> None:
        """Write to ``path``."""
        self._tensors, self._path, self._safetensors = flat(files), path, safetensors

    def start(self) -> None:
        """See ``Way``."""
        if self._safetensors:
            save_file(self._tensors, self._path)
        else:
            torch.save(self._tensors, self._path)  # noqa: TID251

    def finish(self) -> None:
        """See ``Way``."""
        sync(self._path)

    def clear(self) -> None:
        """See ``Way``."""
        self._path.unlink()


class Distributed:
    """``torch.distributed.checkpoint.save``; it syncs its files."""

    def __init__(self, files: Files, directory: Path) -> None:
        """Write below ``directory``."""
        self._tensors, self._directory = flat(files), directory

    def start(self) -> None:
        """See ``Way``."""
        save(self._tensors, checkpoint_id=self._directory, no_dist=True)

    def finish(self) -> None:
        """See ``Way``; it is done."""

    def clear(self) -> None:
        """See ``Way``."""
        shutil.rmtree(self._directory)


class DistributedAsync:
    """``async_save``, as it is or with a stager whose buffers stay."""

    def __init__(self, files: Files, directory: Path, *, cached: bool) -> None:
        """Write below ``directory``."""
        self._tensors, self._directory = flat(files), directory
        # The switches are for pinned and shared memory, streams and other needs of a GPU.
        options = StagingOptions(False, False, False, False)
        self._stager: AsyncStager | None = DefaultStager(options) if cached else None

    def start(self) -> None:
        """See ``Way``."""
        response = async_save(
            self._tensors,
            checkpoint_id=self._directory,
            async_stager=self._stager,
            no_dist=True,
        )
        # Without a thread that copies, the copy is there, and all that comes is the upload.
        assert isinstance(response, Future)
        self._upload: Future[object] = response

    def finish(self) -> None:
        """See ``Way``."""
        self._upload.result()

    def clear(self) -> None:
        """See ``Way``."""
        shutil.rmtree(self._directory)
