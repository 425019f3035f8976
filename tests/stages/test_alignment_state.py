"""What a student keeps of its alignment: through kills, on other worlds, with several teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.stages.evaluate import evaluate
from cmkd_scale.stages.student import student
from tests.conftest import Launch
from tests.stages.conftest import Story
from tests.stages.test_stages import KILL_AT_STEP

AT_RANK_1 = """
import os, sys
if os.environ["RANK"] == "1":
    {}
else:
    from cmkd_scale.cli import program
    program(sys.argv[3:])
"""

SPOIL = """
import sys
from cmkd_scale.training import loop

step, real = int(sys.argv[2]), loop.Trainer._finish

def spoiled(self, stepped):
    real(self, stepped)
    if stepped.underway.step == step:
        self.engine.module.memories[0].potentials.value[0] += 1e-6

loop.Trainer._finish = spoiled
from cmkd_scale.cli import program
program(sys.argv[3:])
"""


def at_rank_1(path: Path, program: str) -> Path:
    """A script that is ``program`` on rank 1 and ``cmkd`` on the others."""
    path.write_text(AT_RANK_1.format("\n    ".join(program.strip().splitlines())))
    return path


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def state(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "checkpoints" / "latest" / "model.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("targets.")}


@pytest.mark.multirank
def test_potentials_and_ring_survive_a_kill_and_another_world(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    method = {"ring_size": 40, "refresh_every_steps": 3, "potential_optimizer": "averaged"}
    whole = tmp_path / "whole"
    student(story.config(whole, method=method), console=False)
    script = at_rank_1(tmp_path / "kill.py", KILL_AT_STEP)
    for number in ("SIGKILL", "SIGTERM"):
        run = tmp_path / number
        file = write_config(tmp_path / f"{number}.yaml", story.tree(run, method=method))
        done = launch(script, number, "6", "student", "--config", file, processes=2, check=False)
        assert done.returncode != 0
        saved = (run / "checkpoints" / "latest").resolve().name
        assert saved == ("step_00000004" if number == "SIGKILL" else "step_00000007")
        launch("student", "--config", file, processes=3)
        ours, undisturbed = state(run), state(whole)
        assert ours.keys() == undisturbed.keys()
        assert int(ours["targets.0.statistics.written"]) == 12 * 12
        for name, value in undisturbed.items():
            torch.testing.assert_close(ours[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.multirank
def test_ranks_that_come_to_differ_are_stopped(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    run = tmp_path / "run"
    tree = story.tree(run, train={"check_ranks_every_steps": 2})
    file = write_config(tmp_path / "student.yaml", tree)
    script = at_rank_1(tmp_path / "spoil.py", SPOIL)
    done = launch(script, "-", "4", "student", "--config", file, processes=2, check=False)
    assert "exitcode  : 42" in done.stderr, done.stderr
    assert "statistics of rank 1 differ from those of rank 0" in done.stderr
    assert '"memory_rank_mismatches": 1.0' in (run / "metrics.jsonl").read_text()
    # What was saved before is sound.
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000004"


def test_two_teachers_of_other_widths_teach_one_student(story: Story, tmp_path: Path) -> None:
    memories = [str(story.memory), str(story.memory / "memory.safetensors")]
    config = story.config(
        tmp_path,
        model={"feature_dim": 12},
        memory={"run": memories},
        train={"steps": 60},
    )
    results = student(config, console=False)
    assert results["metrics"]["test/accuracy"] > 0.9
    names = {path.name for path in (tmp_path / "checkpoints" / "latest").glob("memory*")}
    assert names == {"memory.safetensors", "memory_1.safetensors"}
    tensors = load_file(tmp_path / "checkpoints" / "latest" / "model.safetensors")
    assert tensors["projectors.0.weight"].shape == (8, 12)
    assert tensors["projectors.1.weight"].shape == (8, 12)
    again = evaluate(story.config(tmp_path))
    assert again["metrics"] == results["metrics"]
    assert results["memory_files"] == [str(story.memory / "memory.safetensors")] * 2
    # The report draws features and prototypes in one space.
    assert load_file(tmp_path / "predictions.safetensors")["features"].shape[1] == 8
    pictures = write_report([tmp_path], tmp_path / "report.html")
    assert any("prototype" in picture.name for picture in pictures)


def test_the_student_is_measured_against_the_memory(story: Story, tmp_path: Path) -> None:
    metrics = student(story.config(tmp_path, train={"steps": 60}), console=False)["metrics"]
    for name in ("nearest_prototype", "knn", "teacher_head"):
        assert metrics[f"test/{name}_accuracy"] > 0.85, name
    untaught = student(
        story.config(tmp_path / "ce", method={"name": "ce"}, train={"steps": 5}), console=False
    )
    assert "test/knn_accuracy" not in untaught["metrics"]


@pytest.mark.parametrize(
    "method",
    [
        {"transport": "soft_label"},
        {"transport": "label_free", "reweight": False},
        {
            "transport": "label_free",
            "cost": "squared_euclidean",
            "search_candidates": 4,
            "search_refresh_steps": 3,
        },
        {"potential_optimizer": "sgd", "mass_relaxation": 0.5},
        {"debias": True, "refresh_every_steps": 2, "weights": {"class_bures": 0.1}},
    ],
)
def test_every_way_of_transport_trains_and_resumes_to_the_same_bits(
    story: Story, tmp_path: Path, method: dict[str, Any]
) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    student(story.config(whole, method=method), console=False)
    student(story.config(halved, method=method), console=False)
    # Take the last checkpoint away: the run goes on from the one before.
    newest = (halved / "checkpoints" / "latest").resolve()
    for file in newest.iterdir():
        if file.name == "COMPLETE":
            file.unlink()
    student(story.config(halved, method=method), console=False)
    ends = [run / "checkpoints" / "step_00000012" / "model.safetensors" for run in (whole, halved)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
