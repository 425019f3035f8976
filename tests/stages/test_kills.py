"""A run that is killed again and again ends as one that is left alone, to the last bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from cmkd_scale.memory.bank import load_memory
from cmkd_scale.monitoring.jsonl import read_jsonl
from tests.conftest import REPOSITORY, Launch
from tests.stages.conftest import Story

SCRIPT = REPOSITORY / "tests" / "scripts" / "killed.py"
STEPS = 16
TIMINGS = {
    "step_seconds",
    "samples_per_second",
    "data_wait_seconds",
    "eta_seconds",
    "checkpoint_seconds",
    "checkpoint_stall_seconds",
    "memory_sync_seconds",
    "slowest_rank",
    "slowest_rank_ratio",
    "restarts/resume",
}


def config_file(story: Story, directory: Path, stage: str) -> Path:
    tree: dict[str, Any] = story.tree(
        Path("unused"),
        data={"log_order": True, "n_per_class": 8},
        train={"steps": STEPS, "checkpoint_every_steps": 2, "ema_decay": 0.9},
        memory={"run": str(story.memory), "batch_size": 4},
        teacher={"run": str(story.teacher)},
    )
    tree["run"] = {"collective_timeout_seconds": 60.0}
    if stage == "memory":
        del tree["data"]["n_per_class"]
    file = directory / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def kill_often(launch: Launch, words: list[str | Path], kills: int, seed: int) -> None:
    """Start a run again and again, and end it at random events by random signals."""
    draw = random.Random(seed)
    done = 0
    for _ in range(4 * kills):
        number, rank = draw.choice(["SIGKILL", "SIGTERM"]), str(draw.randrange(2))
        at = str(draw.randint(1, 14))
        ended = launch(SCRIPT, number, rank, at, *words, processes=2, check=False)
        if "killed at event" in ended.stderr:
            assert ended.returncode != 0 or number == "SIGTERM", ended.stderr
            done += 1
        if done == kills:
            return
    pytest.fail(f"only {done} of {kills} kills hit the run")


def logged(run: Path) -> list[dict[str, Any]]:
    """What was logged of each step, without times."""
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in read_jsonl(run / "metrics.jsonl")
    ]


def order(run: Path) -> list[list[dict[str, Any]]]:
    return [read_jsonl(run / "order" / f"rank_0000{rank}.jsonl") for rank in range(2)]


@pytest.mark.multirank
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "kills", "seed"), [("teacher", 8, 1), ("student", 8, 2)])
def test_training_that_is_killed_ends_in_the_same_bits(
    story: Story, tmp_path: Path, launch: Launch, stage: str, kills: int, seed: int
) -> None:
    file = config_file(story, tmp_path, stage)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(stage, "--config", file, f"run.dir={whole}", processes=2)
    words: list[str | Path] = [stage, "--config", file, f"run.dir={killed}"]
    kill_often(launch, words, kills, seed)
    launch(*words, processes=2)
    assert [line["step"] for line in logged(whole)] == list(range(1, STEPS + 1))
    assert logged(killed) == logged(whole)
    for name in ("model.safetensors", "ema.safetensors", "optimizer/state.safetensors"):
        ends = [run / "checkpoints" / f"step_{STEPS:08d}" / name for run in (whole, killed)]
        assert ends[0].read_bytes() == ends[1].read_bytes(), name
    results = [json.loads((run / "results.json").read_text()) for run in (whole, killed)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[1]["restarts"]["resume"] > 0
    # No sample lost, none seen twice.
    assert order(killed) == order(whole)
    assert [len(lines) for lines in order(whole)] == [STEPS, STEPS]
    assert not list((killed / "checkpoints").glob(".*.tmp"))


@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_a_memory_whose_build_is_killed_is_the_same(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    file = config_file(story, tmp_path, "memory")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch("memory", "--config", file, f"run.dir={whole}", processes=2)
    words: list[str | Path] = ["memory", "--config", file, f"run.dir={killed}"]
    kill_often(launch, words, kills=4, seed=3)
    launch(*words, processes=2)
    assert load_memory(killed).digest() == load_memory(whole).digest()
    ends = [load_file(run / "memory.safetensors") for run in (whole, killed)]
    assert ends[0].keys() == ends[1].keys()
