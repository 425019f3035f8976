"""``cmkd memory`` on shards: any ranks, any order, any interruption, the same memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cmkd_scale.config import Config, make_config
from cmkd_scale.data.manifest import MANIFEST, manifest_digest
from cmkd_scale.errors import (
    EXIT_INTEGRITY,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    PreemptedError,
    UsageError,
)
from cmkd_scale.memory import build, spool
from cmkd_scale.memory.bank import FILE_NAME, PrototypeMemory, load_memory, save_memory
from cmkd_scale.memory.one_class import describe_class
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.stages import build_memory, pass_identity
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.pass_plan import Plan, choose_by_key, key_hash
from cmkd_scale.stages.runs import versions
from cmkd_scale.stages.streams import open_split
from cmkd_scale.stages.teacher_pass import PASS
from tests.conftest import REPOSITORY, Launch
from tests.stages.conftest import Story

LIMIT = 11
KILLED = REPOSITORY / "tests" / "scripts" / "memory_killed.py"


def tree(story: Story, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "run": {"dir": str(run)},
        "teacher": {"run": str(story.teacher)},
        "data": {"shards": str(story.shards)},
        "memory": {"batch_size": 5, "max_samples_per_class": LIMIT},
    }
    for name, section in sections.items():
        made[name] = {**made.get(name, {}), **section}
    return made


def config(story: Story, run: Path, **sections: dict[str, Any]) -> Config:
    return make_config(tree(story, run, **sections))


def shuffle_manifests(shards: Path, seed: int) -> None:
    for path in shards.glob(f"*/*/{MANIFEST}"):
        content = json.loads(path.read_bytes())
        listed = list(content["shardlist"])
        random.Random(seed).shuffle(content["shardlist"])
        assert len(listed) < 3 or listed != content["shardlist"]
        content["cmkd"]["digest"] = manifest_digest(content)
        path.write_text(json.dumps(content))


@pytest.mark.multirank
@pytest.mark.slow
def test_one_memory_for_every_number_of_processes_and_order_of_shards(
    story: Story, own_story: Story, tmp_path: Path, launch: Launch
) -> None:
    shuffle_manifests(own_story.shards, seed=2)
    digests = set()
    for processes in (1, 2, 3, 5):
        run = tmp_path / str(processes)
        file = tmp_path / "memory.yaml"
        file.write_text(yaml.safe_dump(tree(story, run)))
        launch("memory", "--config", file, processes=processes)
        built = load_memory(run)
        digests.add(built.digest())
        assert not (run / PASS).exists()
        assert built.class_count.tolist() == [15] * 4
        assert built.class_kept.tolist() == [LIMIT] * 4
    for seed in (1, 2):
        shuffle_manifests(own_story.shards, seed)
        shuffled = config(
            story, tmp_path / f"shuffled-{seed}", data={"shards": str(own_story.shards)}
        )
        digests.add(memory(shuffled)["memory_digest"])
    assert len(digests) == 1


def test_moments_against_numpy_on_all_samples(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[PassedBatch] = []
    monkeypatch.setattr(Spool, "add", recording(Spool.add, passed))
    results = memory(config(story, tmp_path / "run"))
    built = load_memory(tmp_path / "run")
    features = torch.cat([batch.features for batch in passed]).double().numpy()
    labels = torch.cat([batch.labels for batch in passed]).numpy()
    assert sorted(torch.cat([batch.positions for batch in passed]).tolist()) == list(range(60))
    for label in range(4):
        own = features[labels == label]
        np.testing.assert_allclose(built.class_mean[label], own.mean(0), atol=1e-6)
        np.testing.assert_allclose(built.class_variance[label], own.var(0), atol=1e-6)
    assert results["metrics"]["memory/samples"] == 60
    assert results["metrics"]["memory/samples_kept"] == 4 * LIMIT
    assert results["metrics"]["memory/peak_resident_bytes"] > 2**20
    assert results["classes"]["without_samples"] == {"count": 0, "first": []}


def recording(real: Any, passed: list[PassedBatch]) -> Any:
    def add(self: Spool, batch: PassedBatch) -> None:
        passed.append(batch)
        real(self, batch)

    return add


@pytest.mark.multirank
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_a_killed_build_goes_on_where_it_stopped_on_any_number_of_processes(
    story: Story, tmp_path: Path, launch: Launch, processes: int
) -> None:
    undisturbed = memory(config(story, tmp_path / "undisturbed"))
    run = tmp_path / "run"
    file = tmp_path / "memory.yaml"
    file.write_text(yaml.safe_dump(tree(story, run)))
    # Rank 1 of 2 is killed when it has written its third part of one batch.
    done = launch(KILLED, "1", "3", "memory", "--config", file, processes=2, check=False)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    assert not (run / "memory.safetensors").exists()
    left = len(list((run / PASS).glob("part-*")))
    assert left >= 3
    launch("memory", "--config", file, processes=processes)
    results = json.loads((run / "results.json").read_text())
    assert results["memory_digest"] == undisturbed["memory_digest"]
    assert results["metrics"]["memory/batches"] == 15  # of shards of 16, 16, 16 and 12
    assert results["metrics"]["memory/batches_reused"] == left
    assert not (run / PASS).exists()


@pytest.mark.slow
def test_a_kill_between_pass_and_memory_costs_no_second_pass(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    file = tmp_path / "memory.yaml"
    file.write_text(yaml.safe_dump(tree(story, run)))
    done = subprocess.run(
        [sys.executable, str(KILLED), "0", "15", "memory", "--config", str(file)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    passed: list[PassedBatch] = []
    monkeypatch.setattr(Spool, "add", recording(Spool.add, passed))
    again = memory(config(story, run))
    assert passed == []
    whole = memory(config(story, tmp_path / "whole"))
    assert len(passed) == 15
    assert again["memory_digest"] == whole["memory_digest"]


def leave_parts(story: Story, run: Path, **sections: dict[str, Any]) -> None:
    """A build that ends when it has written five parts of two batches each."""
    real, written = Spool.flush, []

    def flush(self: Spool) -> None:
        real(self)
        written.append(self)
        if len(written) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "PART_BATCHES", 2)
        patch.setattr(Spool, "flush", flush)
        with pytest.raises(KeyboardInterrupt):
            memory(config(story, run, **sections))


def test_parts_of_other_settings_are_not_used(story: Story, tmp_path: Path) -> None:
    leave_parts(story, tmp_path / "run")
    run = tmp_path / "other"
    shutil.copytree(tmp_path / "run" / PASS, run / PASS)
    other = memory(config(story, run, memory={"batch_size": 6}))
    assert other["metrics"]["memory/batches_reused"] == 0
    same = memory(config(story, tmp_path / "run"))
    assert same["metrics"]["memory/batches_reused"] == 10


def test_parts_serve_for_the_same_shards_in_another_order(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    leave_parts(story, tmp_path / "run")
    shuffle_manifests(own_story.shards, seed=1)
    shutil.copytree(tmp_path / "run" / PASS, tmp_path / "other" / PASS)
    shuffled = memory(
        config(story, tmp_path / "other", data={"shards": str(own_story.shards)}),
    )
    assert shuffled["metrics"]["memory/batches_reused"] == 10
    assert shuffled["memory_digest"] == memory(config(story, tmp_path / "run"))["memory_digest"]


def damage(story: Story, *numbers: int) -> None:
    for shard in (story.shards / "text" / "train").glob("*.tar"):
        content = shard.read_bytes()
        for number in numbers:
            content = content.replace(b"train %d:" % number, b"train %d;" % number)
        shard.write_bytes(content)


def test_damaged_samples_stay_counted_when_a_build_goes_on(
    own_story: Story, tmp_path: Path
) -> None:
    lenient = {"max_bad_fraction": 0.05}  # 3 of 60
    damage(own_story, 7, 8)
    run = tmp_path / "run"
    leave_parts(own_story, run, data=lenient)
    (run / "quarantine.jsonl").unlink()  # as if another process had met them
    results = memory(config(own_story, run, data=lenient))
    assert results["metrics"]["memory/batches_reused"] == 10
    assert results["metrics"]["memory/skipped"] == 2
    assert results["metrics"]["memory/samples"] == 58
    assert len((run / "quarantine.jsonl").read_text().splitlines()) == 2


def test_samples_that_were_mended_are_passed_again(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    lenient = {"max_bad_fraction": 0.05}
    damage(own_story, 7, 8)
    run = tmp_path / "run"
    leave_parts(own_story, run, data=lenient)
    shutil.rmtree(own_story.shards)
    shutil.copytree(story.shards, own_story.shards)
    (run / "quarantine.jsonl").unlink()
    results = memory(config(own_story, run, data=lenient))
    assert 0 < results["metrics"]["memory/batches_reused"] < 10
    assert results["metrics"]["memory/samples"] == 60
    assert results["metrics"]["memory/skipped"] == 0
    whole = memory(config(story, tmp_path / "whole", data=lenient))
    assert results["memory_digest"] == whole["memory_digest"]


def test_the_choice_by_key_is_exact_and_free_of_order(story: Story, own_story: Story) -> None:
    shuffle_manifests(own_story.shards, seed=1)
    chosen = []
    for shards in (story, own_story):
        data = open_split(make_config({"data": {"shards": str(shards.shards)}}), "train")
        plan = Plan.make(data, 5)
        kept = choose_by_key(data, plan, 4)
        labels = data.labels[plan.places]
        assert np.bincount(labels[kept]).tolist() == [4] * 4
        chosen.append([data.reader.key(place) for place in plan.places[kept].tolist()])
        every = [data.reader.key(place) for place in plan.places.tolist()]
        for label in range(4):
            own = [key for key, of in zip(every, labels, strict=True) if of == label]
            assert set(sorted(own, key=key_hash)[:4]) <= set(chosen[-1])
        assert choose_by_key(data, plan, 15).all()
    assert chosen[0] == chosen[1]


def test_the_hash_of_a_key_never_changes() -> None:
    assert key_hash("toy-train-000007") == int.from_bytes(bytes.fromhex("518b11be897554a0"), "big")


def test_batches_are_of_one_shard_each(story: Story) -> None:
    data = open_split(make_config({"data": {"shards": str(story.shards)}}), "train")
    plan = Plan.make(data, 5)
    batches = [plan.batch(number) for number in range(len(plan))]
    assert sorted(map(len, batches)) == [1, 1, 1, 2, *[5] * 11]
    assert sorted(np.concatenate(batches).tolist()) == list(range(60))
    for places in batches:
        assert len(set(np.searchsorted(data.reader.starts, places, side="right"))) == 1
    none = np.zeros(0, dtype=np.int64)
    assert plan.share(none).tolist() == list(range(len(plan)))
    assert plan.share(np.arange(3)).tolist() == list(range(3, len(plan)))


def test_unlabelled_samples_are_not_passed(story: Story) -> None:
    data = open_split(make_config({"data": {"shards": str(story.shards)}}), "train")
    labels = np.where(np.arange(60) < 20, data.labels, -1)
    plan = Plan.make(replace(data, labels=labels), 5)
    assert sorted(plan.places.tolist()) == list(range(20))
    nothing = replace(data, labels=np.full_like(data.labels, -1))
    with pytest.raises(UsageError, match="No sample has a label"):
        Plan.make(nothing, 5)


def test_a_memory_may_follow_that_of_an_earlier_teacher(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    following = config(story, tmp_path / "run", memory={"previous": str(story.memory)})
    memory(following)
    before, after = load_memory(story.memory), load_memory(tmp_path / "run")
    assert torch.equal(before.prototype_class, after.prototype_class)
    path = own_story.memory / "memory.safetensors"
    save_memory(replace(before, class_names=("a", "b", "c", "d")), path)
    with pytest.raises(UsageError, match=r"memory\.previous.*other classes"):
        memory(config(story, tmp_path / "other", memory={"previous": str(path)}))
    assert load_memory(tmp_path / "run").provenance["previous"] == before.digest()


ONE_RANK = """
import os, signal, sys
from cmkd_scale.cli import program
from cmkd_scale.memory import spool
from cmkd_scale.memory.spool_part import Part
from cmkd_scale.stages import meetings

meetings.MEETING_BATCHES = 2
real, seen = spool.Spool.add, []

def full(*given):
    raise OSError("no space left")

def add(self, batch):
    seen.append(batch)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        if sys.argv[1] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif sys.argv[1] == "diverged":
            batch.features[0, 0] = float("nan")
        else:
            spool.PART_BATCHES, Part.write = 3, full
    real(self, batch)

spool.Spool.add = add
program(sys.argv[2:])
"""


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("what", "code", "says", "passed"),
    [
        # Ranks meet after two batches; rank 1 ends in its third, and rank 0 after its fourth.
        ("signal", EXIT_PREEMPTED, "Stopped by a signal", 4 + 3),
        ("diverged", EXIT_INTEGRITY, "its training has diverged", 4 + 2),
        ("full", EXIT_USAGE, "no space left", 4),
    ],
)
def test_what_ends_one_rank_ends_all_and_keeps_what_has_passed(
    story: Story, tmp_path: Path, launch: Launch, what: str, code: int, says: str, passed: int
) -> None:
    run, file, script = tmp_path / "run", tmp_path / "memory.yaml", tmp_path / "one_rank.py"
    file.write_text(yaml.safe_dump(tree(story, run)))
    script.write_text(ONE_RANK)
    done = launch(script, what, "memory", "--config", file, processes=2, check=False)
    assert f"exitcode  : {code}" in done.stderr, done.stderr
    assert says in done.stderr, done.stderr
    assert not (run / "memory.safetensors").exists()
    again = memory(config(story, run))
    assert again["metrics"]["memory/batches_reused"] == passed
    assert again["memory_digest"] == memory(config(story, tmp_path / "whole"))["memory_digest"]


def test_a_signal_ends_the_build_between_two_blocks(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = describe_class, []

    def describe(label: int, *rest: Any) -> Any:
        seen.append(label)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(label, *rest)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(build, "BLOCK_BYTES", 1)
        patch.setattr(build, "describe_class", describe)
        with pytest.raises(PreemptedError):
            memory(config(story, run))
    assert seen == [0, 1]
    assert memory(config(story, run))["metrics"]["memory/batches_reused"] == 15


def test_parts_go_when_there_are_results(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise UsageError("no space left")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(build_memory, "write_results", full)
        with pytest.raises(UsageError, match="no space left"):
            memory(config(story, run))
    assert list((run / PASS).glob("part-*"))
    memory(config(story, run))
    assert (run / "results.json").exists()
    assert not (run / PASS).exists()


def test_a_finished_run_is_not_built_again(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[PrototypeMemory] = []
    real = PrototypeMemory.digest

    def digest(self: PrototypeMemory) -> str:
        hashed.append(self)
        return real(self)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(PrototypeMemory, "digest", digest)
        first = memory(config(story, run))
    assert len(hashed) == 1
    (run / "results.json").unlink()
    passed: list[PassedBatch] = []
    monkeypatch.setattr(Spool, "add", recording(Spool.add, passed))
    again = memory(config(story, run))
    assert passed == []
    for results in (first, again):
        del results["metrics"]["memory/peak_resident_bytes"]
    assert again["metrics"] == {**first["metrics"], "memory/batches_reused": 15}
    assert again["memory_digest"] == first["memory_digest"]
    assert json.loads((run / "results.json").read_text())["stage"] == "memory"
    content = (run / "memory.safetensors").read_bytes()
    (run / "memory.safetensors").write_bytes(content[:-1])
    assert memory(config(story, run))["memory_digest"] == first["memory_digest"]
    assert len(passed) == 15
    assert load_memory(run).provenance["counts"]["memory/batches"] == 15


def test_a_finished_run_is_built_again_after_another_memory(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    following = config(story, tmp_path / "run", memory={"previous": str(own_story.memory)})
    before = load_memory(own_story.memory)
    digests = {memory(following)["memory_digest"] for _ in range(2)}
    moved = replace(before, prototypes=before.prototypes.flip(0))
    save_memory(moved, own_story.memory / "memory.safetensors")
    digests.add(memory(following)["memory_digest"])
    assert len(digests) == 2


@pytest.mark.parametrize("other", ["processor", "version"])
def test_parts_of_another_kind_of_machine_are_not_used(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    leave_parts(story, tmp_path / "run")
    known = versions()
    with monkeypatch.context() as patch:
        if other == "processor":
            patch.setattr(pass_identity, "processor", lambda device: "another")
        else:
            patch.setattr(pass_identity, "versions", lambda: {**known, "torch": "0"})
        results = memory(config(story, tmp_path / "run"))
    assert results["metrics"]["memory/batches_reused"] == 0
    # The finished memory serves on any machine.
    again = memory(config(story, tmp_path / "run"))
    assert again["metrics"]["memory/batches_reused"] == 15


def test_the_processor_has_a_name() -> None:
    name = pass_identity.processor(torch.device("cpu"))
    assert name == name.strip() != ""


def test_only_what_is_still_damaged_counts_as_skipped(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    lenient = {"max_bad_fraction": 0.05}
    damage(own_story, 7, 8)
    run = tmp_path / "run"
    leave_parts(own_story, run, data=lenient)
    shutil.rmtree(own_story.shards)
    shutil.copytree(story.shards, own_story.shards)
    results = memory(config(own_story, run, data=lenient))  # quarantine.jsonl remembers both
    assert results["metrics"]["memory/samples"] == 60
    assert results["metrics"]["memory/skipped"] == 0


def test_a_class_without_a_kept_sample_is_not_known(own_story: Story, tmp_path: Path) -> None:
    data = open_split(make_config({"data": {"shards": str(own_story.shards)}}), "train")
    plan = Plan.make(data, 5)
    key = data.reader.key(int(plan.places[choose_by_key(data, plan, 1)][0]))
    damage(own_story, int(key.rsplit("-", 1)[1]))
    few = {"max_samples_per_class": 1}
    lenient = {"max_bad_fraction": 0.05}
    metrics = memory(config(own_story, tmp_path / "run", data=lenient, memory=few))["metrics"]
    built = load_memory(tmp_path / "run")
    assert sorted(built.class_count.tolist()) == [14, 15, 15, 15]
    assert sorted(built.class_kept.tolist()) == [0, 1, 1, 1]
    assert metrics["memory/classes"] == len(built.prototype_class.unique()) == 3


def test_a_teacher_may_compute_in_bfloat16(story: Story, tmp_path: Path) -> None:
    def built(name: str, **settings: Any) -> PrototypeMemory:
        memory(make_config(tree(story, tmp_path / name, memory=settings)))
        return load_memory(tmp_path / name / FILE_NAME)

    whole, half = built("float32"), built("bfloat16", mixed_precision="bf16")
    assert whole.digest() != half.digest()
    assert half.class_mean.dtype == torch.float32
    # Eight bits of mantissa.
    torch.testing.assert_close(half.class_mean, whole.class_mean, rtol=0, atol=0.05)
