"""The guard in a real run: a teacher with wrong names does no harm, and a kill loses nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.errors import IntegrityError, PreemptedError
from cmkd_scale.files import read_json
from cmkd_scale.stages.guard import guard_steps
from cmkd_scale.stages.student import student
from tests.conftest import Launch
from tests.stages.conftest import PairsStory
from tests.stages.test_stages import losses, run_to_signal, write_config

GUARDED = {"name": "ucmkd_global", "guard_steps": 60}


@pytest.mark.slow
def test_the_right_teacher_is_trusted_and_a_wrong_one_is_not(
    pairs: PairsStory, tmp_path: Path
) -> None:
    steps = 60
    right = student(pairs.config(tmp_path / "right", GUARDED, steps), console=False)
    (verdict,) = right["guard"]
    assert verdict["trust"] == 1.0
    assert verdict["agreement"]["classes"] == 16
    for control in ("permuted", "random", "orthogonal"):
        run = tmp_path / control
        wrong = student(pairs.config(run, {**GUARDED, "control": control}, steps), console=False)
        assert wrong["guard"][0]["trust"] < 0.5, control
    last = (tmp_path / "right" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["guard_weight"] == 1.0
    assert read_json(tmp_path / "right" / "guard" / "guard.json")["steps"] == 60


def test_without_trust_a_run_is_the_control(pairs: PairsStory, tmp_path: Path) -> None:
    method = {"name": "ucmkd_global", "control": "permuted", "guard_steps": 60}
    guarded = student(pairs.config(tmp_path / "guarded", method), console=False)
    assert guarded["guard"][0]["trust"] == 0.0
    student(pairs.config(tmp_path / "plain", {"name": "ce_ls"}), console=False)
    assert losses(tmp_path / "guarded") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_a_run_that_was_killed_in_its_guard_continues_there(
    pairs: PairsStory, tmp_path: Path
) -> None:
    method = {"name": "ucmkd_global", "guard_steps": 12}
    whole = student(pairs.config(tmp_path / "whole", method), console=False)
    run = tmp_path / "killed"
    file = write_config(tmp_path / "killed.yaml", pairs.tree(run, method))
    done = run_to_signal("SIGKILL", 9, file)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run / "guard" / "checkpoints" / "step_00000008").is_dir()
    assert not (run / "metrics.jsonl").exists()
    again = student(pairs.config(run, method), console=False)
    assert again["guard"] == whole["guard"]
    assert not (run / "guard" / "checkpoints").exists()  # nothing continues from them any more
    assert losses(run) == losses(tmp_path / "whole")


def test_a_signal_in_the_guard_saves_and_stops(
    pairs: PairsStory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmkd_scale.training import loop
    from cmkd_scale.training.schedule import learning_rate_at as real

    def watched(at: int, train: Any) -> float:
        if at == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(at, train)

    monkeypatch.setattr(loop, "learning_rate_at", watched)
    method = {"name": "ucmkd_global", "guard_steps": 12}
    with pytest.raises(PreemptedError):
        student(pairs.config(tmp_path, method), console=False)
    assert (tmp_path / "guard" / "checkpoints" / "latest").resolve().name == "step_00000007"


@pytest.mark.multirank
def test_ranks_come_to_one_verdict(pairs: PairsStory, tmp_path: Path, launch: Launch) -> None:
    verdicts = []
    for world in (1, 3):
        run = tmp_path / str(world)
        whole = {**pairs.tree(run, GUARDED, 4)}
        whole["train"]["global_batch_size"] = 24
        file = write_config(tmp_path / f"{world}.yaml", whole)
        launch("student", "--config", file, processes=world)
        verdicts.append(read_json(run / "results.json")["guard"][0])
    one, three = verdicts
    assert three["trust"] == pytest.approx(one["trust"], abs=0.1)
    assert three["agreement"]["correlation"] == pytest.approx(
        one["agreement"]["correlation"], abs=0.02
    )


def test_the_guards_steps_are_a_fifth_within_bounds(pairs: PairsStory) -> None:
    def of(steps: int, **method: Any) -> int:
        return guard_steps(pairs.config(pairs.root / "unused", method, steps))

    assert [of(steps) for steps in (20, 300, 1000, 10**6)] == [20, 60, 200, 2000]
    assert of(1000, guard_steps=7) == 7


def test_a_damaged_verdict_is_refused(pairs: PairsStory, tmp_path: Path) -> None:
    method = {"name": "ucmkd_global", "guard_steps": 4}
    student(pairs.config(tmp_path, method, 6), console=False)
    (tmp_path / "guard" / "guard.json").write_text('{"memories": [{"trust": 1.0}]}')
    with pytest.raises(IntegrityError, match="remove it, and the guard trains again"):
        student(pairs.config(tmp_path, method, 6), console=False)
