"""Damage, kills and failures at every place where they can happen.

Processes are killed for real, files are damaged for real, and the limits are the system's own.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.training.checkpoint import (
    Checkpoint,
    candidates,
    load_newest,
    problems,
    save_checkpoint,
)
from cmkd_scale.training.checkpoint_writer import CheckpointWriter

MODEL, OPTIMIZER = "model.safetensors", "optimizer/state.safetensors"
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"}
"""Audit events of the interpreter, each raised just before the file system is touched."""


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    weight = torch.full((3, 2), float(step))
    return {MODEL: {"weight": weight}, OPTIMIZER: {"moment": torch.ones(2)}}


def save(directory: Path, step: int, *, keep: int = 1) -> Path:
    return save_checkpoint(directory, Checkpoint({"step": step}, tensors(step)), keep=keep)


def write_in_a_thread(directory: Path, step: int) -> UsageError | None:
    """As a run does it; returns why it failed."""
    writer = CheckpointWriter(directory, keep=1)
    files = {file: iter(content.items()) for file, content in tensors(step).items()}
    writer.start({"step": step}, files, {"memory.safetensors": b"memory"})
    written = writer.wait()
    assert written is not None
    return written.error


def newest(directory: Path) -> int:
    found = load_newest(directory)
    assert found is not None
    step = int(found[0].state["step"])
    assert torch.equal(found[0].files[MODEL]["weight"], torch.full((3, 2), float(step)))
    return step


def fork(work: Callable[[], object]) -> int:
    """A fork of this process that does ``work``, and ends with 0 when that returns."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def in_another_process(work: Callable[[], object]) -> int:
    """The status in which a fork that does ``work`` ends."""
    return os.waitpid(fork(work), 0)[1]


def be_killed_at_change(number: int) -> None:
    """End this process without notice when it's about to touch the file system once more."""
    left = number

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in _CHANGES:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def test_killed_before_any_change_of_the_file_system(tmp_path: Path) -> None:
    seen = []
    for number in range(300):
        directory = tmp_path / str(number)
        save(directory, 1)

        def work(directory: Path = directory, number: int = number) -> None:
            be_killed_at_change(number)
            assert write_in_a_thread(directory, 2) is None

        status = in_another_process(work)
        seen.append(newest(directory))
        assert [problems(path) for path in candidates(directory)] == [[]] * len(
            candidates(directory)
        ), "what was half removed is not taken for a checkpoint that was damaged"
        assert write_in_a_thread(directory, 3) is None
        assert sorted(os.listdir(directory)) == ["latest", "step_00000003"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0, "the last attempt must have run to its end"
    assert (seen[0], seen[-1]) == (1, 2)
    assert seen == sorted(seen)


@pytest.mark.parametrize("size", [0, 1, 50, 90])
def test_killed_in_the_middle_of_a_file(tmp_path: Path, size: int) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write_in_a_thread(tmp_path, 2)

    save(tmp_path, 1)
    assert os.WTERMSIG(in_another_process(work)) == signal.SIGXFSZ
    (half,) = tmp_path.glob(".step_*/model.safetensors")
    assert half.stat().st_size == size
    assert newest(tmp_path) == 1
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".step_*"))


@pytest.mark.parametrize("size", [0, 1, 50, 90])
def test_a_file_that_may_not_grow_is_explained(tmp_path: Path, size: int) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        error = write_in_a_thread(tmp_path, 2)
        assert error is not None
        assert "File too large" in str(error)

    save(tmp_path, 1)
    assert in_another_process(work) == 0
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]
    assert newest(tmp_path) == 1


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    for name in (MODEL, OPTIMIZER, "state.json", "manifest.json"):
        path = checkpoint / name
        content = path.read_bytes()
        for place in range(len(content)):
            for bit in range(8):
                damaged = bytearray(content)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                assert problems(checkpoint), f"{name}, byte {place}, bit {bit}"
        path.write_bytes(content)
    assert not problems(checkpoint)


def test_any_lost_end_is_found(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 1)
    for name in (MODEL, OPTIMIZER, "state.json", "manifest.json"):
        path = checkpoint / name
        content = path.read_bytes()
        for size in range(len(content.rstrip())):
            path.write_bytes(content[:size])
            assert problems(checkpoint), f"{name}, {size} bytes"
        path.write_bytes(content)
    assert not problems(checkpoint)


@pytest.mark.parametrize("name", [MODEL, "state.json", "manifest.json"])
def test_a_file_that_the_disk_cannot_read_is_damage(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1, keep=2)
    path = save(tmp_path, 2, keep=2) / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading its beginning is an input/output error
    with pytest.raises(OSError, match="Input/output error"):
        path.read_bytes()
    assert "Input/output error" in problems(path.parent)[0]
    assert newest(tmp_path) == 1


@pytest.mark.parametrize(
    "checkpoint",
    [
        Checkpoint({"step": 2, "loss": float("nan")}, tensors(2)),
        Checkpoint({"step": 2}, {MODEL: {"weight": torch.zeros(2, dtype=torch.complex64)}}),
    ],
    ids=["no JSON", "no such type"],
)
def test_what_cannot_be_stored_leaves_nothing_behind(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    save(tmp_path, 1)
    with pytest.raises((ValueError, KeyError)):
        save_checkpoint(tmp_path, checkpoint, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=2)
    path = save(tmp_path, 2, keep=2)
    (path / MODEL).write_bytes(b"")
    assert newest(tmp_path) == 1
    save(tmp_path, 2, keep=2)
    assert newest(tmp_path) == 2


def test_a_valid_later_checkpoint_is_never_removed(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 8)
    assert newest(tmp_path) == 9


def test_two_writers_of_one_directory_never_lose_what_is_valid(tmp_path: Path) -> None:
    def work() -> None:
        for step in range(1, 21):
            write_in_a_thread(tmp_path, step)  # may fail: the other has taken its directory

    children = [fork(work) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert newest(tmp_path) > 0
    assert write_in_a_thread(tmp_path, 21) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000021"]
