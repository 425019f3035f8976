from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cmkd_scale.config import make_config
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.memory.bank import load_memory, save_memory
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.evaluate import evaluate
from cmkd_scale.stages.student import student
from cmkd_scale.training.checkpoint import load_newest
from cmkd_scale.training.divergence import DivergedError
from cmkd_scale.training.methods import METHODS
from tests.conftest import REPOSITORY, Launch
from tests.stages.conftest import Story


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def needs_of(name: str, story: Story) -> dict[str, dict[str, Any]]:
    """Sections of a config that give a method what it needs."""
    method = METHODS[name]
    sections: dict[str, dict[str, Any]] = {}
    if method.live:
        sections["teacher"] = {"run": str(story.teacher)}
    if method.memories > 1:
        sections["memory"] = {"run": [str(story.memory)] * method.memories}
    data: dict[str, Any] = {"mode": method.mode} if method.live else {}
    if method.unlabelled:
        data |= {"unlabelled": "rest", "n_per_class": 3}
    return {**sections, "data": data}


def trained(story: Story, run: Path, name: str, control: str = "none", steps: int = 3) -> Any:
    config = story.config(
        run,
        method={"name": name, "control": control},
        train={"steps": steps},
        **needs_of(name, story),
    )
    return student(config, console=False)


@pytest.mark.parametrize(
    ("name", "control"),
    [
        *((name, "none") for name in sorted(METHODS)),
        *itertools.product(
            ("ce_ls", "kd_memory", "ucmkd_global"), ("permuted", "random", "orthogonal")
        ),
    ],
)
def test_every_method_and_control_trains(
    story: Story, tmp_path: Path, name: str, control: str
) -> None:
    results = trained(story, tmp_path, name, control)
    taught = METHODS[name].needs_memory
    expected = f"{name}/{control}" if taught and control != "none" else name
    assert results["method"] == expected
    assert (results["memory_digest"] is not None) == taught
    assert len(losses(tmp_path)) == 3


def test_a_student_run_holds_what_the_interface_promises(story: Story, tmp_path: Path) -> None:
    returned = student(story.config(tmp_path), console=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.yaml",
        "env.json",
        "labels.json",
        "metrics.jsonl",
        "results.json",
        "run_id",
        "checkpoints",
        "predictions.safetensors",
    }
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == returned
    assert results["stage"] == "student"
    assert results["method"] == "ucmkd_global"
    assert results["steps"] == 12
    assert results["memory_digest"] == load_memory(story.memory).digest()
    assert set(results["metrics"]["test/per_class_accuracy"]) == {f"class {i}" for i in range(4)}
    predictions = load_file(tmp_path / "predictions.safetensors")
    right = (predictions["labels"] == predictions["predictions"]).double().mean()
    assert float(right) == results["metrics"]["test/accuracy"]
    assert predictions["features"].shape == (30, 8)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        parts = [value for key, value in record.items() if key.startswith("loss/")]
        assert record["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert [record["samples_seen"] for record in records] == [12 * step for step in range(1, 13)]
    newest = tmp_path / "checkpoints" / "latest"
    assert newest.resolve().name == "step_00000012"
    assert (newest / "memory.safetensors").is_file()


def test_a_teacher_that_knows_the_classes_helps_a_student_to_learn(
    story: Story, tmp_path: Path
) -> None:
    results = student(story.config(tmp_path, train={"steps": 60}), console=False)
    assert results["metrics"]["test/accuracy"] > 0.9


def test_evaluating_again_gives_the_same_figures(story: Story, tmp_path: Path) -> None:
    trained = student(story.config(tmp_path), console=False)
    again = evaluate(story.config(tmp_path))
    assert again["metrics"] == trained["metrics"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["stage"] == "evaluate"


def test_the_memory_keeps_the_teachers_held_out_risk(story: Story) -> None:
    built = load_memory(story.memory)
    results = json.loads((story.memory / "results.json").read_text())
    assert results["memory_digest"] == built.digest()
    assert results["metrics"]["memory/samples"] == 60
    assert built.class_count.tolist() == [15, 15, 15, 15]
    assert torch.isfinite(built.class_risk).all()
    assert re.fullmatch(r"[0-9a-f]{64}", built.provenance["teacher_weights"])


def test_a_memory_stage_run_again_changes_nothing(own_story: Story) -> None:
    before = load_memory(own_story.memory).digest()
    tree = yaml.safe_load((own_story.memory / "config.yaml").read_text())
    tree["run"]["dir"] = str(own_story.memory)
    assert memory(make_config(tree))["memory_digest"] == before
    assert load_memory(own_story.memory).digest() == before


def test_a_run_does_not_continue_with_another_memory(own_story: Story, tmp_path: Path) -> None:
    run = tmp_path / "run"
    student(own_story.config(run, train={"steps": 4}), console=False)
    for checkpoint in (run / "checkpoints").glob("step_*"):
        copy = load_memory(checkpoint / "memory.safetensors")
        assert copy.digest() == load_memory(own_story.memory).digest()
    built = load_memory(own_story.memory)
    save_memory(replace(built, temperature=2.0), own_story.memory / "memory.safetensors")
    with pytest.raises(IntegrityError, match="another memory digest"):
        student(own_story.config(run, train={"steps": 4}), console=False)


def test_a_diverged_run_is_stopped_before_it_is_saved(story: Story, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="has rolled back 2 times already and stops"):
        student(
            story.config(tmp_path, train={"learning_rate": 1e30}),
            console=False,
        )
    found = load_newest(tmp_path / "checkpoints")
    assert found is None or all(
        torch.isfinite(value).all() for value in found[0].files["model.safetensors"].values()
    )


@pytest.mark.slow
def test_two_processes_cannot_write_into_one_run(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    student(story.config(tmp_path / "run", train={"steps": 1}), console=False)  # and keeps it
    tree = story.tree(tmp_path / "run", train={"steps": 1})
    done = launch("student", "--config", write_config(tmp_path / "s.yaml", tree), check=False)
    assert done.returncode == 2
    assert "Another process is writing" in done.stderr


def test_an_unfinished_teacher_or_a_student_is_no_teacher(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    tree = yaml.safe_load((own_story.teacher / "config.yaml").read_text())
    tree["train"]["steps"] = 50
    (own_story.teacher / "config.yaml").write_text(yaml.safe_dump(tree))
    config = {"run": {"dir": str(tmp_path / "m")}, "teacher": {"run": str(own_story.teacher)}}
    with pytest.raises(UsageError, match="at step 12 of 50"):
        memory(make_config(config))
    student(story.config(tmp_path / "s", train={"steps": 1}), console=False)
    config["teacher"]["run"] = str(tmp_path / "s")
    with pytest.raises(UsageError, match="no run of `cmkd teacher`"):
        memory(make_config(config))


@pytest.mark.multirank
def test_the_memory_is_the_same_for_every_number_of_processes(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    digests = {load_memory(story.memory).digest()}
    tree = {"memory": {"batch_size": 8}, "teacher": {"run": str(story.teacher)}}
    file = write_config(tmp_path / "memory.yaml", tree)
    digests = set()
    for processes in (1, 2, 3):
        run = tmp_path / f"memory-{processes}"
        launch("memory", "--config", file, f"run.dir={run}", processes=processes)
        digests.add(load_memory(run).digest())
    assert len(digests) == 1


@pytest.mark.multirank
@pytest.mark.parametrize("via", ["torchrun", "accelerate"])
def test_losses_do_not_depend_on_the_number_of_processes(
    story: Story, tmp_path: Path, launch: Launch, via: Any
) -> None:
    tree = story.tree(tmp_path / "unused", train={"steps": 20})
    file = write_config(tmp_path / "student.yaml", tree)
    curves = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        arguments = ("student", "--config", file, f"run.dir={run}")
        launch(*arguments, processes=processes, via=via if processes > 1 else "torchrun")
        curves[processes] = losses(run)
    assert len(curves[1]) == 20
    assert curves[2] == pytest.approx(curves[1], abs=1e-4)
    one, two = (load_file(tmp_path / n / "predictions.safetensors") for n in "12")
    assert torch.equal(one["labels"], two["labels"])


@pytest.mark.slow
def test_workers_survive_a_signal_to_the_whole_group(story: Story, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = story.tree(run, data={"workers": 1}, train={"steps": 12})
    file = write_config(tmp_path / "student.yaml", tree)
    script = KILL_AT_STEP.replace("signal.raise_signal(number)", "os.killpg(0, number)")
    done = run_to_signal("SIGTERM", 6, file, script=script, own_group=True)
    assert done.returncode == 138, done.stderr
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000007"


KILL_AT_STEP = """
import os, signal, sys, threading
from cmkd_scale.training import loop

number, step = getattr(signal, sys.argv[1]), int(sys.argv[2])
real = loop.learning_rate_at

def watched(at, config):
    if at == step:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # what SIGKILL would cut: test_kills.py has that
                thread.join()
        signal.raise_signal(number)  # to this very thread, so that it is heard of at once
    return real(at, config)

loop.learning_rate_at = watched
from cmkd_scale.cli import program
program(sys.argv[3:])
"""


def run_to_signal(
    number: str, step: int, file: Path, *, script: str = KILL_AT_STEP, own_group: bool = False
) -> subprocess.CompletedProcess[str]:
    """A student of the config ``file``, with a signal to itself at a step."""
    return subprocess.run(
        [sys.executable, "-c", script, number, str(step), "student", "--config", str(file)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=own_group,
    )


@pytest.mark.parametrize(
    ("number", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 138), ("SIGUSR1", 138)]
)
@pytest.mark.slow
def test_a_run_that_was_stopped_continues_to_the_same_end(
    story: Story, tmp_path: Path, number: str, code: int
) -> None:
    undisturbed = tmp_path / "undisturbed"
    student(story.config(undisturbed), console=False)
    stopped = tmp_path / "stopped"
    file = write_config(tmp_path / "student.yaml", story.tree(stopped))
    done = run_to_signal(number, 6, file)
    assert done.returncode == code, done.stderr
    saved = max(p.name for p in (stopped / "checkpoints").glob("step_*"))
    assert saved == ("step_00000004" if number == "SIGKILL" else "step_00000007")
    assert not (stopped / "results.json").exists()
    student(story.config(stopped), console=False)
    assert losses(stopped) == losses(undisturbed)
    for name in ("model.safetensors", "optimizer/state.safetensors"):
        ends = [run / "checkpoints" / "latest" / name for run in (undisturbed, stopped)]
        assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.multirank
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    script = tmp_path / "one_rank.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        + "".join(f"    {line}\n" for line in KILL_AT_STEP.strip().splitlines())
        + "else:\n"
        "    from cmkd_scale.cli import program\n"
        "    program(sys.argv[3:])\n"
    )
    run = tmp_path / "run"
    file = write_config(tmp_path / "student.yaml", story.tree(run))
    done = launch(script, "SIGTERM", "5", "student", "--config", file, processes=2, check=False)
    assert "exitcode  : 138" in done.stderr, done.stderr
    assert (run / "checkpoints" / "latest").resolve().name == "step_00000006"
    # The world may be another one when it continues.
    student(story.config(run), console=False)
    whole = tmp_path / "whole"
    student(story.config(whole), console=False)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)
