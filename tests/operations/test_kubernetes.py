"""What is rendered for which configs, and what is refused with a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.cli import _parser, main
from cmkd_scale.errors import EXIT_USAGE, UsageError
from cmkd_scale.operations.kubernetes import render
from cmkd_scale.operations.kubernetes_kinds import KINDS
from tests.k8s.rendered import container_of, job_specs, of_kind, render_again

TEACHER = {"run": {"dir": "runs/story/teacher"}, "data": {"shards": "s3://bucket/image"}}
MEMORY = {"run": {"dir": "runs/story/memory"}, "teacher": {"run": "runs/story/teacher"}}
STUDENT = {
    "run": {"dir": "/data/runs/story/student"},
    "data": {"shards": "shards/audio"},
    "memory": {"run": "runs/story/memory"},
}


def write(directory: Path, **trees: dict[str, Any]) -> Path:
    """Configs by name; returns the student's."""
    for name, tree in trees.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return directory / "student.yaml"


def stages(result: dict[str, Any]) -> list[str]:
    return list(result["stages"])


def test_the_chain_is_followed_back_to_its_beginning(tmp_path: Path) -> None:
    config = write(tmp_path, student=STUDENT, teacher=TEACHER, memory=MEMORY)
    result = render(config, "jobset", tmp_path / "out")
    assert (stages(result), result["expects"]) == (["teacher", "memory", "student"], [])
    assert result["name"] == "story"
    assert sorted(Path(file) for file in result["files"]) == sorted((tmp_path / "out").iterdir())
    result = render(tmp_path / "memory.yaml", "jobset", tmp_path / "out")
    assert stages(result) == ["teacher", "memory"]


def test_a_run_that_nobody_makes_is_expected_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text("of: another program\n")
    result = render(write(tmp_path, student=STUDENT), "job", tmp_path / "out")
    assert (stages(result), result["expects"]) == (["student"], ["runs/story/memory"])


def test_several_memories_are_numbered_and_a_shared_teacher_is_trained_once(tmp_path: Path) -> None:
    other = {**MEMORY, "run": {"dir": "runs/story/other"}}
    both = {"run": ["runs/story/memory/memory.safetensors", "runs/story/other"]}
    config = write(
        tmp_path, student={**STUDENT, "memory": both}, teacher=TEACHER, memory=MEMORY, other=other
    )
    assert stages(render(config, "jobset", tmp_path / "out")) == [
        *("teacher", "memory-1", "memory-2", "student"),
    ]


@pytest.mark.parametrize(
    ("tree", "verb"),
    [
        (TEACHER, "teacher"),
        ({**TEACHER, "method": {"name": "ce"}}, "teacher"),
        (MEMORY, "memory"),
        (STUDENT, "student"),
        ({**TEACHER, "method": {"name": "ce_ls"}}, "student"),
        ({**MEMORY, "method": {"name": "kd"}, "data": TEACHER["data"]}, "student"),
    ],
)
def test_what_a_config_is_for_is_seen(tree: dict[str, Any], verb: str, tmp_path: Path) -> None:
    manifests = render_again("job", write(tmp_path, student=tree))
    (job,) = job_specs(manifests).values()
    assert container_of(job)["args"] == [verb, f"/etc/cmkd/{verb}.yaml"]


@pytest.mark.parametrize(
    ("section", "change", "named"),
    [
        ("run", {"dir": "/home/me/run"}, "run.dir=/home/me/run"),
        ("run", {"dir": "../run"}, "run.dir=../run"),
        ("data", {"shards": "/scratch/audio"}, "data.shards=/scratch/audio"),
        ("teacher", {"shards": "/scratch/image"}, "teacher.shards=/scratch/image"),
        ("teacher", {"cache": "/scratch/outputs"}, "teacher.cache=/scratch/outputs"),
        ("model", {"backbone": "/models/dinov2"}, "model.backbone=/models/dinov2"),
        ("memory", {"run": ["/old/memory"]}, "memory.run=/old/memory"),
    ],
)
def test_a_path_that_no_pod_has_is_refused(
    section: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = write(tmp_path, student={**STUDENT, section: change})
    with pytest.raises(UsageError, match="No pod has what the config names") as caught:
        render(config, "jobset", tmp_path / "out")
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_builds_on_itself_is_refused(tmp_path: Path) -> None:
    loop = {**MEMORY, "teacher": {"run": "runs/story/memory"}}
    with pytest.raises(UsageError, match="runs/story/memory builds on itself"):
        render(write(tmp_path, student=loop), "job", tmp_path / "out")


def test_a_config_without_a_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.dir"):
        render(write(tmp_path, student={}), "job", tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "Story"),
        ("name", "a" * 41),
        ("namespace", "a b"),
        ("image", "cmkd-scale:latest"),
        ("image", ""),
        ("memory", "32GB"),
        ("shm", "0Gi"),
        ("nodes", 0),
        ("gpus_per_node", -1),
        ("grace_seconds", 0),
    ],
)
def test_an_option_that_makes_no_object_is_refused(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="This cannot be rendered") as caught:
        render(write(tmp_path, student=STUDENT), "job", tmp_path / "out", **{option: value})
    assert f"{option} " in str(caught.value)


def test_all_wrong_options_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nodes must be at least 1, not 0") as caught:
        render(write(tmp_path, student=STUDENT), "job", tmp_path / "out", nodes=0, queue="A")
    assert "queue 'A' is not the name of a local queue" in str(caught.value)


def test_what_the_config_says_of_monitoring_is_kept(tmp_path: Path) -> None:
    monitored = {**STUDENT, "monitor": {"linger_seconds": 5.0, "prometheus_port": 1234}}
    (configs,) = of_kind(render_again("job", write(tmp_path, student=monitored)), "ConfigMap")
    assert yaml.safe_load(configs["data"]["student.yaml"]) == {
        **STUDENT,
        "monitor": {
            "linger_seconds": 5.0,
            "prometheus_port": 9400,
            "prometheus_address": "0.0.0.0",
        },
    }


def test_the_verb_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, student=STUDENT)
    words = ["kubernetes", "render", "--config", str(config), "--out", str(tmp_path / "out")]
    assert main([*words, "--kind", "job", "--nodes", "3", "--name", "mine", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kind"], result["name"]) == ("job", "mine")
    (job,) = of_kind(list(yaml.safe_load_all(Path(result["files"][1]).read_text())), "Job")
    assert job["spec"]["completions"] == 3
    assert main([*words, "--kind", "jobset"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "jobset story: student"
    assert said[-1] == "runs/story/memory must be on the claim: no config here makes it"
    assert main([*words, "--kind", "jobset", "--nodes", "0"]) == EXIT_USAGE


def test_the_command_line_offers_every_kind() -> None:
    for kind in KINDS:
        words = ["kubernetes", "render", "--config", "c", "--out", "o", "--kind", kind]
        assert _parser().parse_args(words).kind == kind
