"""What a run does with its data: damaged samples, label names, sampling, workers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.data.manifest import load_manifest
from cmkd_scale.errors import EXIT_INTEGRITY, IntegrityError, UsageError
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.conftest import Launch
from tests.stages.conftest import Story


def damage(story: Story, split: str, *numbers: int) -> None:
    directory = story.shards / "text" / split
    for record in load_manifest(directory).shards:
        shard = directory / record.url
        content = shard.read_bytes()
        for number in numbers:
            content = content.replace(
                b"%s %d:" % (split.encode(), number), b"%s %d;" % (split.encode(), number)
            )
        shard.write_bytes(content)


def quarantined(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_without_damaged_samples_and_says_so(
    own_story: Story, tmp_path: Path
) -> None:
    damage(own_story, "train", 7, 8)
    damage(own_story, "test", 3)
    run = tmp_path / "run"
    lenient = {"max_bad_fraction": 0.05}  # 3 of 60, 1 of 30
    results = teacher(own_story.config(run, data=lenient), console=False)
    keys = {"toy-train-000007", "toy-train-000008", "toy-test-000003"}
    assert {line["key"] for line in quarantined(run)} == keys
    assert {line["reason"] for line in quarantined(run)} == {"checksum"}
    assert sum(line.get("samples_skipped/checksum", 0) for line in logged(run)) >= 4  # 2 epochs
    assert results["metrics"]["test/samples"] == 29
    assert results["metrics"]["test/skipped"] == 1
    damage(own_story, "validation", 4)
    built = memory(
        own_story.config(tmp_path / "memory", data=lenient, teacher={"run": str(own_story.teacher)})
    )
    assert built["metrics"]["memory/samples"] == 58
    assert built["metrics"]["memory/skipped"] == 2
    assert built["metrics"]["memory/skipped_held_out"] == 1


def test_a_continued_run_knows_what_was_left_out_before(own_story: Story, tmp_path: Path) -> None:
    damage(own_story, "train", 7, 8)
    run = tmp_path / "run"
    config = own_story.config(run, data={"max_bad_fraction": 0.05})  # 3 of 60
    teacher(config, console=False)
    before = quarantined(run)
    assert sorted(line["place"] for line in before) == [7, 8]
    for path in (run / "checkpoints").glob("step_00000012"):
        shutil.rmtree(path)  # so that it continues at step 8
    damage(own_story, "train", *range(20, 60))
    with pytest.raises(IntegrityError, match="4 of 60"):  # counted over both parts of the run
        teacher(config, console=False)
    assert quarantined(run)[:2] == before


def test_a_run_that_ended_for_damage_ends_again(own_story: Story, tmp_path: Path) -> None:
    damage(own_story, "train", 7)
    run = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(IntegrityError, match="1 of 60"):
            teacher(own_story.config(run), console=False)
    assert len(quarantined(run)) == 1
    # It goes on when that is allowed, which makes no other run of it.
    teacher(own_story.config(run, data={"max_bad_fraction": 0.05}), console=False)


@pytest.mark.parametrize("split", ["train", "test"])
def test_more_damage_than_allowed_ends_a_run(own_story: Story, tmp_path: Path, split: str) -> None:
    damage(own_story, split, 7)
    with pytest.raises(IntegrityError, match=r"toy-.*000007 of .*shard-000000"):
        teacher(own_story.config(tmp_path / "run"), console=False)


def test_a_lost_shard_is_refused_before_training(own_story: Story, tmp_path: Path) -> None:
    (own_story.shards / "text" / "train" / "shard-000002.tar").unlink()
    with pytest.raises(IntegrityError, match=r"shard-000002.*16 of 60 samples are missing"):
        teacher(own_story.config(tmp_path / "run"), console=False)
    assert not (tmp_path / "run").exists()


SEPARATE_DISKS = """
import sys
import torch.distributed as dist
from pathlib import Path
from cmkd_scale import distributed
from cmkd_scale.config import make_config
from cmkd_scale.errors import IntegrityError
from cmkd_scale.stages.streams import open_quarantine, open_split
dist.init_process_group("gloo")
data = open_split(make_config({"data": {"shards": sys.argv[1]}}), "train")
for allowed in (0.05, 0.04):
    try:
        found = open_quarantine(Path(sys.argv[2], str(distributed.rank())), data, allowed, 60)
        line = f"{len(found)} known"
    except IntegrityError:
        line = "refused"
    print(line + "\\n", end="", flush=True)
distributed.leave()
distributed.end(0)
"""


@pytest.mark.multirank
def test_machines_that_share_no_disk_know_the_same_damaged_samples(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    script = tmp_path / "separate_disks.py"
    script.write_text(SEPARATE_DISKS)
    name = load_manifest(story.shards / "text" / "train").name
    for rank, places in (("0", [7, 8]), ("1", [8, 9])):
        (tmp_path / rank).mkdir()
        lines = [json.dumps({"data": name, "place": place}) + "\n" for place in places]
        (tmp_path / rank / "quarantine.jsonl").write_text("".join(lines))
    done = launch(script, story.shards, tmp_path, processes=3)
    assert sorted(done.stdout.split("\n")[:-1]) == ["3 known"] * 3 + ["refused"] * 3


@pytest.mark.multirank
def test_ranks_together_stay_within_the_budget(
    own_story: Story, tmp_path: Path, launch: Launch
) -> None:
    damage(own_story, "train", *range(0, 40, 5))  # 8 of 60, about half for each rank
    arguments = []
    for name, allowed in (("strict", 0.1), ("lenient", 0.2)):  # 6 and 12
        run = tmp_path / name
        tree = own_story.tree(run, data={"max_bad_fraction": allowed})
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        arguments.append(("teacher", "--config", file))
    strict = launch(*arguments[0], processes=2, check=False)
    assert f"exitcode  : {EXIT_INTEGRITY}" in strict.stderr, strict.stderr
    assert "max_bad_fraction=0.1 allows 6" in strict.stderr
    launch(*arguments[1], processes=2)
    found = {line["key"] for line in quarantined(tmp_path / "lenient")}
    assert found == {f"toy-train-{number:06d}" for number in range(0, 40, 5)}


def test_labels_are_compared_before_training(
    story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = {"class 3": "another"}
    with caplog.at_level(logging.INFO, "cmkd_scale"):
        student(story.config(tmp_path / "run", data={"label_map": renamed}), console=False)
    report = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert report["shared"] == ["class 0", "class 1", "class 2"]
    assert (report["only_here"], report["only_there"]) == (["another"], ["class 3"])
    assert "3 of 4 classes are in both" in caplog.text
    assert "only in student (text): another" in caplog.text


def test_classes_may_be_renamed_and_merged(story: Story, tmp_path: Path) -> None:
    merged = {"class 2": "class 0", "class 3": "class 1"}
    results = teacher(story.config(tmp_path / "run", data={"label_map": merged}), console=False)
    assert set(results["metrics"]["test/per_class_accuracy"]) == {"class 0", "class 1"}
    wrong = story.config(tmp_path / "b", data={"label_map": {"klass 2": "x"}})
    with pytest.raises(UsageError, match="no class 'klass 2'"):
        teacher(wrong, console=False)


@pytest.mark.parametrize("sampling", ["square_root", "balanced"])
def test_sampling_by_class_trains(story: Story, tmp_path: Path, sampling: str) -> None:
    results = teacher(story.config(tmp_path / "run", data={"sampling": sampling}), console=False)
    assert results["metrics"]["test/samples"] == 30


@pytest.mark.slow
def test_workers_change_nothing(story: Story, tmp_path: Path) -> None:
    curves = []
    for workers in (0, 2):
        run = tmp_path / str(workers)
        results = teacher(story.config(run, data={"workers": workers}), console=False)
        losses = [line["loss"] for line in logged(run) if "loss" in line]
        curves.append((losses, results["metrics"]))
    assert curves[0] == curves[1]
