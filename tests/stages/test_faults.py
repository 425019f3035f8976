"""What goes wrong in a long run, and how it ends: numbers, workers, ranks, signals."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cmkd_scale.config import Config
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.records import Batch
from cmkd_scale.stages.student import student
from cmkd_scale.training import checkpoint
from cmkd_scale.training.checkpoint import load_newest
from cmkd_scale.training.distillation import Distillation, StepResult
from cmkd_scale.training.divergence import DivergedError
from cmkd_scale.training.tensor_file import write_tensors
from tests.conftest import REPOSITORY, Launch
from tests.stages.conftest import Story

SCRIPTS = REPOSITORY / "tests" / "scripts"

KILL_WORKERS = """
import os, signal, sys
import psutil
from cmkd_scale.training import loop
from cmkd_scale.cli import program

real = loop.learning_rate_at

def watched(at, config):
    if at == 5:
        for child in psutil.Process().children(recursive=True):
            if "forkserver" in " ".join(child.cmdline()) and not child.children():
                child.send_signal(signal.SIGKILL)
    return real(at, config)

if __name__ == "__main__":  # workers import this file, too
    if os.environ.get("RANK", "0") == sys.argv[1]:
        loop.learning_rate_at = watched
    program(sys.argv[2:])
"""

SIGNAL_IN_EVALUATION = """
import os, signal, sys
from cmkd_scale.stages import forward_pass
from cmkd_scale.cli import program

real = forward_pass.ordered_batches

def watched(*arguments, **more):
    for number, batch in enumerate(real(*arguments, **more)):
        if number == 0 and os.environ.get("RANK", "0") == rank:
            # To this very thread: another one might take its time to hear of it.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)  # a second one is not fatal
        yield batch

forward_pass.BATCH_SIZE = 8  # so that each rank has some of the 30 samples
forward_pass.ordered_batches = watched
rank, *sys.argv[1:] = sys.argv[1:]
program()
"""


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """The loss of batches ``first`` to ``last`` of the stream, counted from 0, is no number."""
    batches, forward = TrainLoader.batches, Distillation.forward
    bad = False

    def watched(self: TrainLoader) -> Generator[Batch, None, None]:
        nonlocal bad
        for batch in batches(self):
            number = self.delivered // self.global_batch_size - 1
            bad = first <= number <= last
            yield batch

    def spoilt(self: Distillation, *arguments: Any) -> StepResult:
        result = forward(self, *arguments)
        return result._replace(loss=result.loss * torch.nan) if bad else result

    monkeypatch.setattr(TrainLoader, "batches", watched)
    monkeypatch.setattr(Distillation, "forward", spoilt)


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def run_config(story: Story, run: Path, **train: Any) -> Config:
    return story.config(
        run,
        data={"log_order": True, "augment": False},
        train={"steps": 20, "max_skipped_steps": 2, **train},
    )


def keys_read(run: Path) -> list[list[str]]:
    return [line["keys"] for line in read_jsonl(run / "order" / "rank_00000.jsonl")]


def finite(run: Path) -> bool:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return all(
        bool(torch.isfinite(tensor).all())
        for tensors in found[0].files.values()
        for tensor in tensors.values()
    )


def test_a_batch_that_gives_no_gradient_is_left_out(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 7)
    results = student(run_config(story, tmp_path), console=False)
    assert results["restarts"] == {"resume": 0, "rollback": 0}
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line.get("steps_skipped")] == [7, 8]
    assert finite(tmp_path)
    state = load_file(tmp_path / "checkpoints" / "latest" / "optimizer" / "state.safetensors")
    assert {float(v) for name, v in state.items() if name.endswith("/step")} == {18.0}


def test_too_many_of_them_roll_the_run_back_and_are_not_read_again(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    student(run_config(story, whole, steps=24), console=False)
    spoil(monkeypatch, 6, 8)
    run = tmp_path / "run"
    results = student(run_config(story, run), console=False)
    assert results["restarts"] == {"resume": 0, "rollback": 1}
    assert results["steps"] == 20
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert finite(run)
    # Back to the weights after step 4, and on with batch 9: 5 batches have had no effect.
    stream = keys_read(whole)
    assert keys_read(run) == stream[:4] + stream[9:24] + keys_read(run)[19:]


def test_a_run_that_keeps_failing_stops(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 6, 1000)
    with pytest.raises(DivergedError, match="has rolled back 2 times already and stops") as caught:
        student(run_config(story, tmp_path), console=False)
    assert caught.value.exit_code == 1
    assert finite(tmp_path)


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = write_tensors, 0

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        nonlocal calls
        calls += 1
        if calls <= 2:  # the first two checkpoints
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    student(run_config(story, tmp_path), console=False)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert sum(line.get("checkpoint_failures", 0) for line in lines) == 2
    assert "The run goes on and tries again" in caplog.text
    monkeypatch.setattr(checkpoint, "write_tensors", lambda path, tensors: full(tmp_path, {}))
    calls = -1000
    with pytest.raises(UsageError, match="No space left on device"):
        student(run_config(story, tmp_path / "never", max_checkpoint_failures=1), console=False)


@pytest.mark.multirank
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_decoding_workers_that_die_end_the_run(
    story: Story, tmp_path: Path, launch: Launch, processes: int, workers: int
) -> None:
    run = tmp_path / "run"
    tree = story.tree(run, data={"workers": workers}, train={"steps": 2000})
    file = write_config(tmp_path / "student.yaml", tree)
    script = tmp_path / "kill_workers.py"
    script.write_text(KILL_WORKERS)
    last = str(processes - 1)
    done = launch(
        script, last, "student", "--config", file, processes=processes, check=False, timeout=120
    )
    assert done.returncode != 0
    assert f"One of {workers} processes that decode samples was killed" in done.stderr
    assert "continues from the newest checkpoint" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert (run / "checkpoints" / "latest" / "COMPLETE").exists()


@pytest.mark.multirank
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_in_the_evaluation_leaves_nothing_half_done(
    story: Story, tmp_path: Path, launch: Launch, processes: int
) -> None:
    run = tmp_path / "run"
    file = write_config(tmp_path / "student.yaml", story.tree(run, train={"steps": 4}))
    script = tmp_path / "signalled.py"
    script.write_text(SIGNAL_IN_EVALUATION)
    words: list[str | Path] = [script, str(processes - 1), "student", "--config", file]
    done = launch(*words, processes=processes, check=False)
    said = f"{done.returncode} {done.stdout} {done.stderr}"
    assert "Stopped by a signal during the evaluation" in said, said
    assert (done.returncode == 138) if processes == 1 else ("exitcode  : 138" in done.stderr)
    assert not (run / "results.json").exists()
    launch("student", "--config", file, processes=processes)
    assert (run / "results.json").exists()
    words[2] = "evaluate"
    done = launch(*words, processes=processes, check=False)
    assert "Stopped by a signal during the evaluation" in done.stderr
    assert not (run / "evaluation.json").exists()


@pytest.mark.multirank
def test_a_gang_that_lost_a_rank_is_started_again_and_goes_on(story: Story, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = write_config(tmp_path / "student.yaml", story.tree(run))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "--max_restarts", "1"]
    command += [str(SCRIPTS / "killed.py"), "SIGKILL", "1", "7"]
    done = subprocess.run(
        [*command, "student", "--config", str(file)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as in launchers/torchrun.sh
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "killed at event 7" in done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["restarts"]["resume"] == 1
    steps = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, 13))
