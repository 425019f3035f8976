"""The entry point of pods: torchrun's variables become those of the launcher; stops are codes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY, kill_tree

LAUNCHERS = REPOSITORY / "launchers"

STAND_IN = """#!/usr/bin/env bash
echo "$NODES $NODE_RANK $MASTER_ADDR $MASTER_PORT ${PROCESSES:-counted} [${!PET_@}] $*"
"""


def load(name: str) -> ModuleType:
    """A launcher's file as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCHERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def entrypoint(tmp_path: Path) -> Path:
    """It, beside a stand-in of the launcher that it hands over to."""
    shutil.copy(LAUNCHERS / "entrypoint.sh", tmp_path)
    (tmp_path / "multi_node.sh").write_text(STAND_IN)
    (tmp_path / "multi_node.sh").chmod(0o755)
    return tmp_path / "entrypoint.sh"


def run(entrypoint: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [entrypoint, "student", "a b.yaml"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "1 0 127.0.0.1 29500 counted"),
        (
            {
                "PET_NNODES": "4",
                "PET_NODE_RANK": "3",
                "PET_NPROC_PER_NODE": "8",
                "PET_MASTER_ADDR": "localhost",
                "PET_MASTER_PORT": "1234",
            },
            "4 3 localhost 1234 8",
        ),
        ({"PET_NPROC_PER_NODE": "auto"}, "1 0 127.0.0.1 29500 counted"),
        ({"PET_NPROC_PER_NODE": "gpu"}, "1 0 127.0.0.1 29500 counted"),
        ({"PET_NPROC_PER_NODE": "cpu"}, f"1 0 127.0.0.1 29500 {len(os.sched_getaffinity(0))}"),
    ],
)
def test_the_launcher_is_told_what_torchrun_would_be(
    entrypoint: Path, variables: dict[str, str], told: str
) -> None:
    done = run(entrypoint, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    # No PET_ variable is left: Accelerate would hand it to torchrun beside its own options.
    assert done.stdout == f"{told} [] student a b.yaml\n"


def test_a_run_that_may_change_its_size_is_refused(entrypoint: Path) -> None:
    done = run(entrypoint, PET_NNODES="1:4")
    assert done.returncode == 2
    assert "PET_NNODES=1:4 is not a number" in done.stderr


def test_a_name_that_never_comes_is_told(entrypoint: Path) -> None:
    done = run(entrypoint, PET_MASTER_ADDR="nowhere.invalid", DNS_WAIT_SECONDS="0")
    assert done.returncode == 1
    assert "The first pod's name nowhere.invalid is not known" in done.stderr


def test_a_stop_before_anything_has_begun_asks_to_be_started_again(entrypoint: Path) -> None:
    waiting = subprocess.Popen(
        [entrypoint, "student", "c.yaml"],
        env={"PATH": os.environ["PATH"], "PET_MASTER_ADDR": "nowhere.invalid"},
    )
    try:
        # It waits once it has a child that looks the name up, or sleeps.
        children = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children")
        while not children.read_text():
            time.sleep(0.01)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(timeout=60) == 138
    finally:
        if waiting.poll() is None:
            kill_tree(waiting.pid)


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([138, -15], 138),
        ([1, 42], 42),
        ([138, 2], 2),
        ([1, -9], 1),
        ([-11], 1),
        ([], 1),
    ],
)
def test_one_exit_code_stands_for_those_of_all_processes(codes: list[int], code: int) -> None:
    assert load("accelerate_launch").exit_code(codes) == code


@pytest.mark.multirank
def test_a_wrong_config_ends_the_launcher_with_the_programs_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [LAUNCHERS / "one_node.sh", "student", str(tmp_path / "none.yaml")],
        env={
            **{name: value for name, value in os.environ.items() if "ACCELERATE" not in name},
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "PROCESSES": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "none.yaml cannot be read" in done.stderr
