"""Two machines, which are network namespaces here: trained together, cut apart, and slow."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.config import Config
from cmkd_scale.errors import PreemptedError
from cmkd_scale.stages.student import student
from tests.conftest import REPOSITORY, kill_tree
from tests.namespaces import ADDRESSES, CARD, ip, two_namespaces
from tests.stages.conftest import Story

MULTI_NODE = REPOSITORY / "launchers" / "multi_node.sh"


@dataclass
class Job:
    """A launcher on one machine; it speaks into a file, which never fills up as a pipe does."""

    launcher: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text()

    def ended(self) -> int:
        """Its exit code, when it has ended."""
        return self.launcher.wait(timeout=120)


@dataclass
class Machines:
    """Two namespaces with a cable between them."""

    names: tuple[str, str]

    @contextlib.contextmanager
    def start(self, config: Path, backend: str = "ddp") -> Iterator[list[Job]]:
        """``launchers/multi_node.sh student CONFIG`` on both, with one process each."""
        jobs: list[Job] = []
        try:
            for machine in (0, 1):
                jobs.append(self._start_one(machine, config, backend))
            yield jobs
        finally:
            for job in jobs:
                if job.launcher.poll() is None:
                    kill_tree(job.launcher.pid)
                    job.launcher.wait()

    def _start_one(self, machine: int, config: Path, backend: str) -> Job:
        environment = {
            **os.environ,
            "NODES": "2",
            "NODE_RANK": str(machine),
            "MASTER_ADDR": ADDRESSES[0],
            "PROCESSES": "1",
            "BACKEND": backend,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": CARD,
        }
        words = [self.names[machine], str(MULTI_NODE), "student", str(config)]
        output = config.with_suffix(f".machine{machine}.txt")
        with output.open("w") as file:
            launcher = subprocess.Popen(
                ["ip", "netns", "exec", *words], env=environment, stdout=file, stderr=file
            )
        return Job(launcher, output)

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", CARD, "down")

    def join(self) -> None:
        """Plug it in again."""
        ip("-n", self.names[1], "link", "set", CARD, "up")

    def slow(self, rate: str) -> None:
        """Let no more than ``rate`` through in each direction."""
        for name in self.names:
            shape = f"qdisc replace dev {CARD} root tbf rate {rate} burst 32kbit latency 400ms"
            command = ["ip", "netns", "exec", name, "tc", *shape.split()]
            subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with two_namespaces() as names:
        yield Machines(names)


def write_config(story: Story, run: Path, **train: Any) -> Path:
    tree = story.tree(run, train=train)
    tree["run"]["collective_timeout_seconds"] = 5.0
    file = run.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def wait_for_step(run: Path, step: int, jobs: list[Job]) -> None:
    """Until ``step`` is logged; a job that ends before fails the test."""
    while not any(line["step"] >= step for line in logged(run)):
        for job in jobs:
            assert job.launcher.poll() is None, job.said()
        time.sleep(0.1)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's log that are whole."""
    log = run / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train_alone(config: Config, run: Path, steps: int) -> list[float]:
    """The losses of this process's own run, which is stopped once it has logged ``steps``."""

    def stop() -> None:
        while len(logged(run)) < steps:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(PreemptedError):
        student(config, console=False)
    return [line["loss"] for line in logged(run)][:steps]


@pytest.mark.multirank
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_machines_that_are_cut_apart_end_and_go_on_over_a_slow_cable(
    story: Story, tmp_path: Path, machines: Machines, backend: str
) -> None:
    if backend == "zero2":
        pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    run = tmp_path / "run"
    # So many steps that the cable is pulled, and the signal sent, in the middle of them.
    train = {"steps": 100_000, "checkpoint_every_steps": 4}
    config = write_config(story, run, **train)
    with machines.start(config, backend) as jobs:
        wait_for_step(run, 12, jobs)
        machines.cut()
        for job in jobs:
            assert job.ended() != 0
            assert "Another process of this run is gone" in job.said(), job.said()
            assert "continues from the newest checkpoint" in job.said()
    saved = int((run / "checkpoints" / "latest").resolve().name.removeprefix("step_"))
    assert saved >= 4
    # The same command goes on; then it is asked to stop.
    machines.join()
    machines.slow("2mbit")
    with machines.start(config, backend) as jobs:
        wait_for_step(run, saved + 12, jobs)
        for job in jobs:
            job.launcher.send_signal(signal.SIGTERM)
        for job in jobs:
            assert job.ended() != 0
        assert "the state is saved" in jobs[0].said(), jobs[0].said()
    lines = logged(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))  # each once
    own = tmp_path / "alone"
    alone = train_alone(story.config(own, train=train), own, len(lines))
    assert [line["loss"] for line in lines] == pytest.approx(alone, rel=1e-4)
    assert all(line["memory_sync_bytes"] > 0 for line in lines)
    # What the cable costs is in the log: for people, not for a test, to judge.
    parts = lines[1:saved], lines[saved + 1 :]  # less the first steps, which set up
    fast, slow = (statistics.median(line["step_seconds"] for line in part) for part in parts)
    print(f"{backend}: a step takes {slow / fast:.1f} times as long at 2 Mbit/s")
