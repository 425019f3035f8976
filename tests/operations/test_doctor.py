from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.cli import main
from cmkd_scale.operations.doctor import Report, doctor
from cmkd_scale.operations.doctor_findings import Finding
from cmkd_scale.wording import doctor_lines
from tests.stages.conftest import Story


def look(
    story: Story, directory: Path, stage: str = "student", /, **sections: dict[str, Any]
) -> Report:
    """A doctor's look at a run of the story, with sections changed."""
    tree = story.tree(directory)
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    file = directory.with_name("config.yaml")
    file.write_text(yaml.safe_dump(tree))
    return doctor(file, stage=stage, seconds=0.01)


def worst(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity != "ok"]


def only(report: Report, check: str, severity: str) -> Finding:
    """The one finding that is worth a word."""
    found = worst(report)
    assert [(finding.check, finding.severity) for finding in found] == [(check, severity)], found
    return found[0]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard_of(story: Story, split: str = "train") -> Path:
    return min((story.shards / "text" / split).glob("*.tar"))


def test_nothing_is_said_of_a_healthy_run(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run")
    assert worst(report) == []
    assert report.exit_code == 0
    assert (report.stage, report.ranks) == ("student", 1)
    assert report.estimate is not None
    assert report.estimate.parameters > 1000
    assert report.estimate.hours > 0
    text = doctor_lines(report.to_json())
    assert text.startswith("all well")
    assert "\n" not in text
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_a_memory_and_a_teacher_are_looked_at_too(story: Story, tmp_path: Path) -> None:
    assert worst(look(story, tmp_path / "run", "teacher", memory={"run": None})) == []
    report = look(
        story,
        tmp_path / "other",
        "memory",
        teacher={"run": str(story.teacher)},
        memory={"run": None},
        data={"shards": None},
    )
    assert worst(report) == []
    assert report.estimate is not None
    assert report.estimate.hours > 0


def test_unknown_key(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", train={"stepz": 3})
    assert "did you mean 'steps'" in only(report, "config", "blocker").found
    assert (report.exit_code, report.stage) == (2, None)


def test_no_shards(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", data={"shards": str(tmp_path / "nowhere")})
    assert "there is no directory" in only(report, "shards", "blocker").found
    assert report.exit_code == 2


def test_no_test_split(own_story: Story, tmp_path: Path) -> None:
    (own_story.shards / "text" / "test").rename(tmp_path / "elsewhere")
    report = look(own_story, tmp_path / "run")
    assert "holds no split 'test'" in only(report, "shards", "blocker").found


def test_flipped_byte_in_a_shard(own_story: Story, tmp_path: Path) -> None:
    flip(shard_of(own_story))
    finding = only(look(own_story, tmp_path / "run"), "shards", "blocker")
    assert "SHA-256" in finding.found
    assert finding.integrity
    assert "cmkd shards verify" in finding.remedy


def test_missing_shard(own_story: Story, tmp_path: Path) -> None:
    shard_of(own_story).unlink()
    report = look(own_story, tmp_path / "run")
    assert "cannot be opened" in only(report, "shards", "blocker").found
    assert report.exit_code == 42


def test_no_memory(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", memory={"run": str(tmp_path / "none")})
    assert "no prototype memory" in only(report, "memory", "blocker").found
    assert report.exit_code == 2


def test_damaged_memory(own_story: Story, tmp_path: Path) -> None:
    flip(own_story.memory / "memory.safetensors")
    report = look(own_story, tmp_path / "run", memory={"run": str(own_story.memory)})
    assert only(report, "memory", "blocker").integrity
    assert report.exit_code == 42


def test_method_without_what_it_needs(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", memory={"run": None})
    assert "memory" in only(report, "method", "blocker").found


def test_run_directory_that_is_a_file(story: Story, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    report = look(story, tmp_path / "run")
    assert "is no directory" in only(report, "run directory", "blocker").found


def test_run_directory_of_another_run(story: Story, tmp_path: Path) -> None:
    report = look(story, story.teacher, "student")
    assert "is a run of `cmkd teacher`" in only(report, "run directory", "blocker").found
    (story.teacher.with_name("config.yaml")).unlink()


def test_newest_checkpoint_damaged_and_then_all(own_story: Story) -> None:
    newest, oldest = sorted(own_story.teacher.glob("checkpoints/step_*"), reverse=True)
    config = yaml.safe_load((own_story.teacher / "config.yaml").read_text())
    config["run"]["dir"] = str(own_story.teacher)
    file = own_story.root / "same.yaml"
    file.write_text(yaml.safe_dump(config))
    flip(newest / "model.safetensors")
    finding = only(doctor(file, stage="teacher", seconds=0.01), "checkpoints", "warning")
    assert f"go on from {oldest.name}" in finding.found
    flip(oldest / "model.safetensors")
    report = doctor(file, stage="teacher", seconds=0.01)
    assert only(report, "checkpoints", "blocker").integrity
    assert report.exit_code == 42


def test_batch_that_cannot_be_divided(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", train={"gradient_accumulation_steps": 5})
    assert "cannot be divided" in only(report, "batch", "blocker").found


def test_batch_larger_than_an_epoch(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", train={"global_batch_size": 120})
    assert "each is in a batch 2.0 times" in only(report, "samples", "warning").found
    assert report.exit_code == 0


def test_more_samples_a_class_than_there_are(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", data={"n_per_class": 99})
    assert "n_per_class" in only(report, "samples", "blocker").found


def test_labels_that_do_not_meet(story: Story, tmp_path: Path) -> None:
    stored = json.loads((story.shards / "text" / "train" / "manifest.json").read_text())
    names = stored["cmkd"]["label_names"]
    others = {name: f"other {name}" for name in names}
    report = look(story, tmp_path / "run", data={"label_map": others})
    assert "no class in common" in only(report, "labels", "blocker").found
    one = look(story, tmp_path / "run", data={"label_map": {names[0]: "of nobody"}})
    finding = only(one, "labels", "warning")
    assert "3 of 4 classes are in both" in finding.found
    assert "label_map" in finding.remedy


def test_port_of_the_metrics_is_taken(story: Story, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        report = look(story, tmp_path / "run", monitor={"prometheus_port": taken.getsockname()[1]})
    assert "cannot be listened on" in only(report, "metrics port", "warning").found


def test_deadline_that_will_be_missed(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", monitor={"deadline": "2020-01-01T00:00:00Z"})
    assert "after monitor.deadline" in only(report, "deadline", "warning").found


def test_watchdog_shorter_than_a_step(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", run={"watchdog_seconds": 1e-6})
    assert "run.watchdog_seconds" in only(report, "watchdog", "blocker").remedy


def test_launch_that_is_not_what_the_config_wants(story: Story, tmp_path: Path) -> None:
    report = look(story, tmp_path / "run", run={"world_size": 4})
    assert "not what it seems" in only(report, "launch", "blocker").found


def test_model_that_does_not_fit(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "cmkd_scale.operations.doctor_estimate.available_memory"
    monkeypatch.setattr(module, lambda: 1000)
    finding = only(look(story, tmp_path / "run"), "memory of a rank", "blocker")
    assert "Use more ranks" in finding.remedy


def test_disk_without_room(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full())
    finding = only(look(story, tmp_path / "run"), "disk", "blocker")
    assert "3 checkpoints of" in finding.found


def test_the_verb(story: Story, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(story.tree(tmp_path / "run")))
    arguments = ["doctor", "--config", str(file), "--price-per-hour", "2"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["estimate"]["cost"] == pytest.approx(2 * report["estimate"]["hours"])
    assert {finding["severity"] for finding in report["findings"]} == {"ok"}
    assert main([*arguments, "data.shards=nowhere"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("BLOCKER: shards: ")
    assert "1 blocking" in captured.err
    assert main([*arguments, "--stage", "pupil"]) == 2
    assert "unknown" in capsys.readouterr().err
