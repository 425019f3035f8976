from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmkd_scale.cli import main
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.operations.checkpoints import info, verify
from cmkd_scale.training.checkpoint import Checkpoint, save_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 30):
        state = {"step": step, "samples_seen": 8 * step, "method": "ce", "restarts": {"resume": 2}}
        files = {"model.safetensors": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}}
        save_checkpoint(tmp_path / "checkpoints", Checkpoint(state, files), keep=3)
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_its_checkpoints_and_one_of_them_are_verified(run: Path) -> None:
    assert [row["step"] for row in verify(run)["checkpoints"]] == [1, 2, 30]
    assert len(verify(run / "checkpoints")["checkpoints"]) == 3
    assert [row["step"] for row in verify(run / "checkpoints" / "latest")["checkpoints"]] == [30]


def test_each_damaged_one_is_named(run: Path) -> None:
    flip(run / "checkpoints" / "step_00000002" / "model.safetensors")
    (run / "checkpoints" / "step_00000030" / "COMPLETE").unlink()
    with pytest.raises(IntegrityError, match="2 of 3 checkpoints") as caught:
        verify(run)
    assert "step_00000002: model.safetensors does not match its SHA-256" in str(caught.value)
    assert "step_00000030: it was never completed" in str(caught.value)


def test_what_each_holds(run: Path) -> None:
    found = info(run)
    assert found["latest"] == "step_00000030"
    last = found["checkpoints"][-1]
    assert (last["step"], last["samples_seen"], last["method"]) == (30, 240, "ce")
    assert (last["tensors"], last["numbers"]) == (2, 9)
    assert last["files"] == ["model.safetensors", "state.json"]


def test_what_cannot_be_read_is_listed_all_the_same(run: Path) -> None:
    (run / "checkpoints" / "step_00000001" / "state.json").write_text("{")
    (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"short")
    rows = info(run)["checkpoints"]
    assert "unreadable" in rows[0]
    assert "unreadable" in rows[1]
    assert rows[2]["step"] == 30


def test_where_there_is_none(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "step_00000001"):
        with pytest.raises(UsageError, match="holds no checkpoint"):
            info(directory)


def test_the_verbs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "3 checkpoints, every digest right" in capsys.readouterr().out
    assert main(["checkpoint", "info", str(run)]) == 0
    assert "step_00000030 (latest): " in capsys.readouterr().out
    assert main(["checkpoint", "info", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["checkpoints"]) == 3
    flip(run / "checkpoints" / "step_00000002" / "model.safetensors")
    assert main(["checkpoint", "verify", str(run)]) == 42
    assert main(["checkpoint", "verify", str(run / "nothing")]) == 2
