"""The launchers start ranks that know each other, and hand every word over unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
ARGUMENTS = ["student", "a b.yaml", "run.dir=c d"]
EXPECTED = ["student", "--config", "a b.yaml", "run.dir=c d"]

# Stands where cmkd_scale would be found: the launchers are under test, not the stages.
STAND_IN = """\
import json, os, sys
from accelerate import Accelerator
me = Accelerator()
with open(f"rank{me.process_index}.json", "x") as file:
    json.dump({"world": me.num_processes, "arguments": sys.argv[1:]}, file)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "cmkd_scale"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return tmp_path


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with this interpreter and no GPU, in ``cwd``."""
    return subprocess.run(
        command,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(cwd),
            "CUDA_VISIBLE_DEVICES": "",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


def ranks(directory: Path) -> dict[str, object]:
    """What each rank wrote, by file name."""
    return {file.name: json.loads(file.read_text()) for file in directory.glob("rank*.json")}


@pytest.mark.multirank
@pytest.mark.parametrize("launcher", ["one_node.sh", "torchrun.sh"])
def test_launcher_starts_two_joined_cpu_ranks(launcher: str, stand_in: Path) -> None:
    done = run([str(LAUNCHERS / launcher), *ARGUMENTS], stand_in)
    assert done.returncode == 0, done.stderr
    rank = {"world": 2, "arguments": EXPECTED}
    assert ranks(stand_in) == {"rank0.json": rank, "rank1.json": rank}


@pytest.mark.multirank
def test_the_cpu_config_starts_two_joined_ranks(stand_in: Path) -> None:
    config = LAUNCHERS / "accelerate" / "ddp_cpu_2.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    done = run(
        [*launch, "--config_file", str(config), "-m", "cmkd_scale"],
        stand_in,
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert ranks(stand_in).keys() == {"rank0.json", "rank1.json"}


@pytest.mark.parametrize("launcher", ["one_node.sh", "torchrun.sh"])
def test_usage_is_told(launcher: str, tmp_path: Path) -> None:
    asked = run([str(LAUNCHERS / launcher), "--help"], tmp_path)
    forgotten = run([str(LAUNCHERS / launcher), "student"], tmp_path)
    assert (asked.returncode, forgotten.returncode) == (0, 2)
    assert "usage:" in asked.stdout
    assert forgotten.stderr == asked.stdout
