"""The Slurm script under stand-ins of Slurm's commands: signal, save, requeue, continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, kill_tree
from tests.stages.conftest import Story

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
echo $$ > "$STEP"
SLURM_NODEID=0 exec "$@"
"""
SCANCEL = """#!/usr/bin/env bash
# All processes of the step hear it, as under Slurm.
tree() { for child in $(pgrep -P "$1"); do tree "$child"; done; kill -USR1 "$1"; }
[ "$1" = --signal=USR1 ] && tree "$(cat "$STEP")"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def submit(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """The job on a cluster of one node."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launchers" / "slurm.sbatch"), *words],
        env={
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "STEP": str(tmp_path / "step"),
            "REQUEUED": str(tmp_path / "requeued"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "CUDA_VISIBLE_DEVICES": "",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
            "SLURM_JOB_NODELIST": "node",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_ID": str(os.getpid()),
        },
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def config_file(story: Story, run: Path, steps: int) -> Path:
    file = run.parent / f"{steps}.yaml"
    file.write_text(yaml.safe_dump(story.tree(run, train={"steps": steps})))
    return file


@pytest.mark.multirank
def test_a_job_that_runs_out_of_time_saves_and_queues_itself_again(
    story: Story, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(tmp_path, "student", str(config_file(story, run, steps=100_000)))
    try:
        log = run / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") > 3):  # it trains
            assert job.poll() is None, job.communicate()[1]
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does, to the script alone
        _, said = job.communicate()
    finally:
        if job.poll() is None:
            kill_tree(job.pid)
    # All processes were signalled, and ended by themselves: no launcher died of it or killed one.
    assert "exitcode  : 138" in said, said
    assert job.returncode == 0, said
    assert "Stopped by a signal" in said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert (run / "checkpoints" / "latest" / "COMPLETE").exists()


@pytest.mark.multirank
def test_a_job_that_ends_or_fails_is_not_queued_again(story: Story, tmp_path: Path) -> None:
    file = config_file(story, tmp_path / "run", steps=3)
    job = submit(tmp_path, "student", str(file))
    _, said = job.communicate()
    assert job.returncode == 0, said
    assert (tmp_path / "run" / "results.json").exists()
    job = submit(tmp_path, "student", str(file), "train.nonsense=1")
    _, said = job.communicate()
    assert job.returncode != 0
    assert "train.nonsense: unknown key" in said
    assert not (tmp_path / "requeued").exists()
