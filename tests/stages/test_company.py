"""Runs with a live teacher, or with samples without labels: kills, ranks, refusals."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.config import make_config
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.conftest import Launch
from tests.data.examples import build_toy
from tests.stages.conftest import Story
from tests.stages.test_stages import losses, needs_of, run_to_signal, write_config


def tree_of(story: Story, run: Path, name: str, **train: Any) -> dict[str, Any]:
    return story.tree(run, method={"name": name}, train=train, **needs_of(name, story))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "socket", "c2kd"])
def test_a_killed_run_continues_exactly(story: Story, tmp_path: Path, name: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sections = needs_of(name, story)
    student(story.config(whole, method={"name": name}, **sections), console=False)
    file = write_config(tmp_path / "student.yaml", tree_of(story, killed, name))
    done = run_to_signal("SIGKILL", 6, file)
    assert done.returncode == -signal.SIGKILL, done.stderr
    student(story.config(killed, method={"name": name}, **sections), console=False)
    assert losses(killed) == losses(whole)
    name = "model.safetensors"
    ends = [run / "checkpoints" / "latest" / name for run in (whole, killed)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.multirank
def test_three_ranks_read_and_learn_as_one(story: Story, tmp_path: Path, launch: Launch) -> None:
    found = []
    for world in (1, 3):
        run = tmp_path / str(world)
        file = write_config(tmp_path / f"{world}.yaml", tree_of(story, run, "kd"))
        launch("student", "--config", file, processes=world)
        found.append(losses(run))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_another_teacher_does_not_continue_the_run(own_story: Story, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sections = needs_of("kd", own_story)
    method = {"name": "kd"}
    student(own_story.config(run, method=method, train={"steps": 4}, **sections), console=False)
    tree = own_story.tree(tmp_path / "other")
    tree["run"]["seed"] = 5
    teacher(make_config(tree), console=False)
    shutil.rmtree(own_story.teacher)
    shutil.move(tmp_path / "other", own_story.teacher)
    with pytest.raises(IntegrityError, match="another teacher digest"):
        student(own_story.config(run, method=method, train={"steps": 4}, **sections), console=False)


def test_what_has_no_partner_is_refused(story: Story, tmp_path: Path) -> None:
    build_toy(tmp_path / "more", count=60, classes=5)
    build_toy(tmp_path / "more", "test", count=60, classes=5)
    sections = needs_of("kd", story)
    sections["data"] |= {"shards": str(tmp_path / "more")}
    config = story.config(tmp_path / "run", method={"name": "kd"}, **sections)
    with pytest.raises(UsageError, match=r"1 of 5 classes have no sample.*class 4"):
        student(config, console=False)


def test_paired_data_is_read_by_key(story: Story, tmp_path: Path) -> None:
    sections = needs_of("kd", story)
    sections["data"] |= {"mode": "paired"}
    config = story.config(tmp_path / "a", method={"name": "kd"}, train={"steps": 3}, **sections)
    student(config, console=False)
    build_toy(tmp_path / "fewer", count=20)
    sections["teacher"] |= {"shards": str(tmp_path / "fewer")}
    with pytest.raises(UsageError, match=r"40 of 60 samples of the student have no partner"):
        student(story.config(tmp_path / "b", method={"name": "kd"}, **sections), console=False)


def test_without_samples_left_over_there_are_none_to_read(story: Story, tmp_path: Path) -> None:
    sections = needs_of("socket", story)
    sections["data"]["n_per_class"] = 15
    with pytest.raises(UsageError, match=r"lower data\.n_per_class"):
        student(story.config(tmp_path, method={"name": "socket"}, **sections), console=False)
