"""What tests of all rooms share: real data where it is at hand, and programs on several ranks."""

from __future__ import annotations

import os

# Several test processes share few cores; read by OpenMP and faiss when they are first loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import hypothesis
import psutil
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

Via = Literal["torchrun", "accelerate"]

hypothesis.settings.register_profile("local", deadline=None)
# In CI the same examples every time: a red run is a change in the code, never in the draw.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fsdd() -> Path:
    """Directory of the real Free Spoken Digit Dataset (holds ``recordings/``), or skip."""
    named = os.environ.get("CMKD_FSDD")
    path = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "fsdd"
    if not (path / "recordings").is_dir():
        reason = f"no Free Spoken Digit Dataset at {path}; set CMKD_FSDD to its directory"
        # A path that somebody named and that is wrong is a mistake, not an absence.
        pytest.fail(reason) if named else pytest.skip(reason)
    return path


class Launch(Protocol):
    """Runs a program to its end on one or several CPU ranks; what the ``launch`` fixture is."""

    def __call__(
        self,
        *arguments: str | Path,
        processes: int = 1,
        via: Via = "torchrun",
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``cmkd ARGUMENTS``, or the script ARGUMENTS[0] if that ends in ``.py``.

        Args:
            arguments: what follows ``python -m cmkd_scale``, or a script and its arguments.
            processes: ranks; 1 starts plain Python unless ``via`` is "accelerate".
            via: what starts several ranks.
            env: added to the environment; None as a value removes the variable.
            cwd: working directory; default the repository.
            timeout: seconds after which the program and all it started are killed.
            check: fail the test, showing the output, when the exit code is not 0.

        Returns:
            The exit code and, as text, stdout and stderr of all ranks together.
        """


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Start programs as users do, with or without a launcher: see ``Launch``."""
    return _launch


def _launch(
    *arguments: str | Path,
    processes: int = 1,
    via: Via = "torchrun",
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    target = words if words[0].endswith(".py") else ["-m", "cmkd_scale", *words]
    command = [sys.executable, *_launcher(processes, via), *target]
    with subprocess.Popen(
        command,
        cwd=cwd or REPOSITORY,
        env=_environment(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            stdout, stderr = program.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(program.pid)
            stdout, stderr = program.communicate()
            pytest.fail(f"{command} ran past {timeout} s\n{stdout}\n{stderr}")
        finally:
            if program.poll() is None:  # the test itself was interrupted
                kill_tree(program.pid)
    done = subprocess.CompletedProcess(command, program.returncode, stdout, stderr)
    if check and done.returncode:
        pytest.fail(f"{command} exited with {done.returncode}\n{stdout}\n{stderr}")
    return done


def _launcher(processes: int, via: Via) -> list[str]:
    """The words between the interpreter and the program."""
    if via == "accelerate":
        return [
            *("-m", "accelerate.commands.accelerate_cli", "launch"),
            "--multi_gpu" if processes > 1 else "--cpu",
            *("--num_processes", str(processes), "--num_machines", "1"),
            *("--main_process_port", str(_free_port())),
            *("--mixed_precision", "no", "--dynamo_backend", "no"),
        ]
    if processes == 1:
        return []
    return [
        *("-m", "torch.distributed.run", "--nproc_per_node", str(processes)),
        *("--master_addr", "127.0.0.1", "--master_port", str(_free_port())),
    ]


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, less what an outer launcher left, plus ``changes``."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    merged: dict[str, str | None] = {
        **{name: value for name, value in os.environ.items() if name not in outer},
        # Without it, ranks on CPUs would train alone, each of them.
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        **changes,
    }
    return {name: value for name, value in merged.items() if value is not None}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_tree(pid: int) -> None:
    """Kill a launcher and its ranks; torchrun puts each rank into a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
