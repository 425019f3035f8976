from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.training import checkpoint as module
from cmkd_scale.training.checkpoint import load_newest
from cmkd_scale.training.checkpoint_writer import CheckpointWriter, Written
from cmkd_scale.training.tensor_file import write_tensors

MODEL = "model.safetensors"


def start(writer: CheckpointWriter, step: int, **tensors: Tensor) -> None:
    writer.start({"step": step}, {MODEL: iter(tensors.items())}, {"memory.safetensors": b"memory"})


def end(writer: CheckpointWriter) -> Written:
    written = writer.wait()
    assert written is not None
    return written


def test_what_changes_after_the_start_is_not_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    weight = torch.arange(1000.0)
    for step in (1, 2):
        start(writer, step, weight=weight)
        weight += 1000.0
        written = end(writer)
        assert written.error is None
        assert written.step == step
        assert 0 < written.stall_seconds <= written.seconds
    for step in (1, 2):
        found = module._read(tmp_path / f"step_{step:08d}")
        assert torch.equal(found.files[MODEL]["weight"], torch.arange(1000.0) + 1000.0 * (step - 1))
    assert (tmp_path / "latest" / "memory.safetensors").read_bytes() == b"memory"


def test_each_tensor_is_taken_once_and_in_order(tmp_path: Path) -> None:
    taken = []

    def items(file: str) -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b"):
            taken.append((file, name))
            yield name, torch.zeros(2)

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.start({"step": 1}, {"x": items("x"), "optimizer/y": items("y")}, {})
    assert taken == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    end(writer)


def test_buffers_are_kept_and_replaced_where_tensors_change(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    start(writer, 1, same=torch.zeros(8), grows=torch.zeros(2), goes=torch.zeros(1))
    end(writer)
    before = {name: value.data_ptr() for name, value in writer._buffers[MODEL].items()}
    start(writer, 2, same=torch.ones(8), grows=torch.ones(3))
    end(writer)
    after = writer._buffers[MODEL]
    assert set(after) == {"same", "grows"}
    assert after["same"].data_ptr() == before["same"]
    found = load_newest(tmp_path)
    assert found is not None
    assert torch.equal(found[0].files[MODEL]["grows"], torch.ones(3))


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, real = threading.Event(), write_tensors

    def slow(path: Path, tensors: Mapping[str, Tensor]) -> str:
        assert goes_on.wait(60)
        return real(path, tensors)

    monkeypatch.setattr(module, "write_tensors", slow)
    writer = CheckpointWriter(tmp_path, keep=1)
    start(writer, 1, weight=torch.zeros(4))
    assert writer.outcome() is None
    assert load_newest(tmp_path) is None
    goes_on.set()
    assert end(writer).path == tmp_path / "step_00000001"
    assert writer.outcome() is None
    assert load_newest(tmp_path) is not None


def test_a_failed_write_is_told_and_the_next_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    start(writer, 1, weight=torch.zeros(4))
    end(writer)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        start(writer, 2, weight=torch.ones(4))
        error = end(writer).error
    assert isinstance(error, UsageError)
    assert "No space left on device" in str(error)
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0].state["step"] == 1
    assert not list(tmp_path.glob(".step_*"))
    start(writer, 3, weight=torch.ones(4))
    assert end(writer).error is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    writer = CheckpointWriter(small_disk, keep=1)
    start(writer, 1, weight=torch.zeros(100_000))  # 0.4 MB
    assert end(writer).error is None
    start(writer, 2, weight=torch.zeros(200_000))  # has no place beside the first
    error = end(writer).error
    assert error is not None
    assert "No space left on device" in str(error)
    found = load_newest(small_disk)
    assert found is not None
    assert found[0].state["step"] == 1
    assert not list(small_disk.glob(".step_*"))  # the space is free again
    start(writer, 3, weight=torch.zeros(120_000))
    assert end(writer).error is None


def test_a_disk_that_may_not_be_written(small_disk: Path) -> None:
    writer = CheckpointWriter(small_disk, keep=1)
    start(writer, 1, weight=torch.zeros(10))
    end(writer)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    start(writer, 2, weight=torch.zeros(10))
    error = end(writer).error
    assert error is not None
    assert "Read-only file system" in str(error)
    found = load_newest(small_disk)
    assert found is not None
    assert found[0].state["step"] == 1


def test_any_other_failure_of_the_thread_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.start({"step": 1, "loss": float("nan")}, {}, {})  # JSON has no such number
    error = end(writer).error
    assert error is not None
    assert "not JSON compliant" in str(error)
    assert load_newest(tmp_path) is None
