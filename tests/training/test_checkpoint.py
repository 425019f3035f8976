from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from cmkd_scale.errors import IntegrityError
from cmkd_scale.training.checkpoint import (
    Checkpoint,
    load_newest,
    problems,
    save_checkpoint,
)


def example(step: int) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(step)), "empty": torch.zeros(0)}
    return Checkpoint(
        state={"step": step, "loader": {"epoch": 1, "position": step}},
        files={"model.safetensors": tensors, "optimizer/state.safetensors": {"m": torch.ones(2)}},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, example(7), keep=2)
    assert path.name == "step_00000007"
    assert sorted(p.name for p in path.iterdir()) == [
        "COMPLETE",
        "manifest.json",
        "model.safetensors",
        "optimizer",
        "state.json",
    ]
    assert (tmp_path / "latest").resolve() == path.resolve()
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0].state == example(7).state
    assert torch.equal(found[0].files["model.safetensors"]["weight"], torch.full((3, 2), 7.0))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, example(step), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000003", "step_00000010"]


def test_a_damaged_later_checkpoint_never_costs_the_one_just_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, example(8), keep=2)
    broken = save_checkpoint(tmp_path, example(10), keep=2)
    harm(broken / "model.safetensors", "flip")
    save_checkpoint(tmp_path, example(9), keep=1)
    found = load_newest(tmp_path)
    assert found is not None
    assert found[0].state["step"] == 9
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000009"]


def test_nothing_saved_is_not_an_error(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, name: str, damage: str
) -> None:
    save_checkpoint(tmp_path, example(1), keep=3)
    newest = save_checkpoint(tmp_path, example(2), keep=3)
    harm(newest / name, damage)
    found = load_newest(tmp_path)
    assert found is not None
    expected = 2 if name == "COMPLETE" and damage != "remove" else 1
    assert found[0].state["step"] == expected


def test_if_none_is_valid_it_says_so(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, example(1), keep=3)
    harm(path / "model.safetensors", "flip")
    with pytest.raises(IntegrityError, match=r"model\.safetensors does not match its SHA-256"):
        load_newest(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, example(1), keep=3)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert "version 2" in problems(path)[0]


def save_and_be_killed(directory: Path, at_sync: int) -> int:
    """Save in a forked process that is killed at its n-th flush; returns the wait status."""
    child = os.fork()
    if child == 0:
        real, calls = os.fsync, 0

        def fsync(handle: int) -> None:
            nonlocal calls
            if calls == at_sync:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            real(handle)

        os.fsync = fsync  # type: ignore[assignment]
        try:
            save_checkpoint(directory, example(2), keep=1)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_writer_killed_at_any_point_leaves_a_valid_newest(tmp_path: Path) -> None:
    newest_after = []
    for at_sync in range(40):
        directory = tmp_path / str(at_sync)
        save_checkpoint(directory, example(1), keep=1)
        status = save_and_be_killed(directory, at_sync)
        found = load_newest(directory)
        assert found is not None
        newest_after.append(found[0].state["step"])
        save_checkpoint(directory, example(3), keep=1)
        assert not list(directory.glob(".step_*")), "leftovers of the killed writer are cleared"
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert status == 0, "the last attempt must have run to its end"
    assert newest_after[0] == 1
    assert newest_after[-1] == 2


def harm(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif content:
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
