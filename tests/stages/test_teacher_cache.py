"""``teacher.cache``: what is read from it is what the teacher says, and nothing else is read."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cmkd_scale.config import Config, make_config
from cmkd_scale.data.teacher_outputs import COMPLETE, MANIFEST, SAMPLES, TeacherOutputs
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.models.model import Model
from cmkd_scale.stages import company, pass_identity, teacher_cache
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.conftest import Launch
from tests.data.examples import build_toy
from tests.stages.conftest import Story
from tests.stages.test_build_memory import damage
from tests.stages.test_build_memory import tree as memory_tree
from tests.stages.test_stages import losses, needs_of

BATCHES = 15 + 7  # of 5 samples: of shards of 16, 16, 16 and 12, and of 16 and 14


def tree(story: Story, run: Path, cache: Path | None, **sections: dict[str, Any]) -> dict[str, Any]:
    made = memory_tree(story, run, **sections)
    made["teacher"]["cache"] = None if cache is None else str(cache)
    return made


def config(story: Story, run: Path, cache: Path | None, **sections: dict[str, Any]) -> Config:
    return make_config(tree(story, run, cache, **sections))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each forward pass of any model."""
    seen: list[int] = []
    real = Model.forward

    def forward(self: Model, inputs: torch.Tensor) -> Any:
        seen.append(len(inputs))
        return real(self, inputs)

    monkeypatch.setattr(Model, "forward", forward)
    return seen


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "SHARD_BATCHES", 2)


@pytest.fixture(scope="session")
def written(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of the story's teacher, never written to."""
    root = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_BATCHES", 2)
        memory(config(story, root / "run", root / "cache"))
    return root / "cache"


@pytest.fixture
def own_cache(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "cache"))


def test_a_memory_from_the_cache_is_that_of_the_live_teacher(
    story: Story, tmp_path: Path, forwards: list[int]
) -> None:
    cache = tmp_path / "cache"
    live = memory(config(story, tmp_path / "live", None))["memory_digest"]
    assert len(forwards) == BATCHES
    assert memory(config(story, tmp_path / "writes", cache))["memory_digest"] == live
    assert len(forwards) == 2 * BATCHES
    assert memory(config(story, tmp_path / "reads", cache))["memory_digest"] == live
    fewer = {"prototypes_per_class": 2}
    other = memory(config(story, tmp_path / "other", cache, memory=fewer))["memory_digest"]
    assert len(forwards) == 2 * BATCHES
    assert other == memory(config(story, tmp_path / "same", None, memory=fewer))["memory_digest"]
    assert other != live


TWICE = """
import sys
from pathlib import Path
from cmkd_scale import distributed
from cmkd_scale.config import load_config
from cmkd_scale.stages import teacher_cache
from cmkd_scale.stages.build_memory import memory

real, passed = teacher_cache._Filling.add, []

def add(self, number, said):
    if self._directory.name == "train":
        passed.append(number)
    real(self, number, said)

teacher_cache._Filling.add = add
for file in sys.argv[1:]:
    memory(load_config(Path(file)))
print(f"rank {distributed.rank()}: {len(passed)} train batches")
distributed.leave()
distributed.end(0)
"""


@pytest.mark.multirank
@pytest.mark.slow
def test_two_ranks_write_and_read_it(story: Story, tmp_path: Path, launch: Launch) -> None:
    small = {"batch_size": 2}  # 30 batches: files of 16 and 14 of them
    cache, script, files = tmp_path / "cache", tmp_path / "twice.py", []
    script.write_text(TWICE)
    for name in ("writes", "reads"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(story, tmp_path / name, cache, memory=small)))
        files.append(file)
    done = launch(script, *files, processes=2)
    passes = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert passes == ["rank 0: 16 train batches", "rank 1: 14 train batches"]
    live = memory(config(story, tmp_path / "live", None, memory=small))["memory_digest"]
    for name in ("writes", "reads"):
        results = yaml.safe_load((tmp_path / name / "results.json").read_text())
        assert results["memory_digest"] == live
    alone = memory(config(story, tmp_path / "alone", cache, memory=small))
    assert alone["memory_digest"] == live


KILLED = """
import os, signal, sys
from cmkd_scale.cli import program
from cmkd_scale.stages import teacher_cache

teacher_cache.SHARD_BATCHES = 2
real, written = teacher_cache.write_shard, []

def write(*given):
    real(*given)
    written.append(given)
    if os.environ["RANK"] == "1" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

teacher_cache.write_shard = write
program(sys.argv[1:])
"""


@pytest.mark.multirank
def test_one_that_was_killed_half_way_goes_on_with_other_ranks(
    story: Story, tmp_path: Path, launch: Launch, written: Path, forwards: list[int]
) -> None:
    file, cache, script = tmp_path / "memory.yaml", tmp_path / "cache", tmp_path / "killed.py"
    file.write_text(yaml.safe_dump(tree(story, tmp_path / "run", cache)))
    script.write_text(KILLED)
    done = launch(script, "memory", "--config", file, processes=2, check=False)
    assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr
    left = len(list((cache / "train").glob("outputs-*")))
    assert 2 <= left < 8
    with pytest.raises(UsageError, match=r"train holds unfinished outputs.*`cmkd memory"):
        TeacherOutputs(cache / "train")
    (cache / "train" / ".outputs-half.1.tmp").write_bytes(b"half")
    again = memory(config(story, tmp_path / "run", cache))
    # 7 files of two batches and one of one; whichever are left, they hold that many.
    assert 2 * left - 1 <= BATCHES - len(forwards) <= 2 * left
    assert not list((cache / "train").glob(".*"))
    for split in ("train", "validation"):
        names = [
            sorted(path.name for path in (root / split).iterdir()) for root in (cache, written)
        ]
        assert names[0] == names[1]  # with the SHA-256 of their content
    assert again["memory_digest"] == memory(config(story, tmp_path / "live", None))["memory_digest"]


def test_a_cache_that_is_gone_is_written_again_for_a_finished_memory(
    story: Story, tmp_path: Path, forwards: list[int]
) -> None:
    given = config(story, tmp_path / "run", tmp_path / "cache")
    first = memory(given)
    memory(given)
    assert len(forwards) == BATCHES
    shutil.rmtree(tmp_path / "cache")
    assert memory(given)["memory_digest"] == first["memory_digest"]
    assert len(forwards) == 2 * BATCHES
    assert (tmp_path / "cache" / "validation" / COMPLETE).exists()


def another_teacher(story: Story) -> None:
    tree = story.tree(story.root / "other")
    tree["run"]["seed"] = 5
    teacher(make_config(tree), console=False)
    shutil.rmtree(story.teacher)
    shutil.move(story.root / "other", story.teacher)


@pytest.mark.parametrize("what", ["teacher", "transform", "data", "batch_size", "mixed_precision"])
def test_a_cache_of_anything_else_is_refused_by_its_name(
    own_story: Story,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    settings: dict[str, Any] = {}
    names = {
        "teacher": "another teacher",
        "transform": "another transform",
        "data": "other shards",
        "batch_size": "another memory.batch_size",
        "mixed_precision": "another memory.mixed_precision",
    }
    if what == "teacher":
        another_teacher(own_story)
    elif what == "transform":
        real = pass_identity.transform_identity
        other = lambda trained: {**real(trained), "max_bytes": 7}  # noqa: E731
        monkeypatch.setattr(pass_identity, "transform_identity", other)
        names["transform"] += r' ({"max_bytes": 64} there, {"max_bytes": 7} here)'
    elif what == "data":
        for split in ("train", "validation"):
            shutil.rmtree(own_story.shards / "text" / split)
            build_toy(own_story.shards, split, per_shard=15)
    else:
        settings = {"memory": {what: 6 if what == "batch_size" else "bf16"}}
    before = sorted(path.name for path in own_cache.rglob("*"))
    with pytest.raises(UsageError) as refused:
        memory(config(own_story, tmp_path / "run", own_cache, **settings))
    assert {name for name, text in names.items() if text in str(refused.value)} == {what}
    assert sorted(path.name for path in own_cache.rglob("*")) == before
    if not settings:
        shards = {"shards": str(own_story.shards)}
        with pytest.raises(UsageError, match=re.escape(names[what])):
            student(kd(own_story, tmp_path / "student", own_cache, teacher=shards), console=False)


@pytest.mark.parametrize("name", ["outputs", SAMPLES, MANIFEST])
def test_a_flipped_byte_is_found_and_what_is_whole_is_kept(
    story: Story, own_cache: Path, tmp_path: Path, forwards: list[int], name: str
) -> None:
    file = next(path for path in sorted((own_cache / "train").iterdir()) if name in path.name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match=str(own_cache)):
        memory(config(story, tmp_path / "memory", own_cache))
    with pytest.raises(IntegrityError, match=str(own_cache)):
        student(kd(story, tmp_path / "student", own_cache))
    if name != MANIFEST:  # the remedy
        file.unlink()
        (own_cache / "train" / COMPLETE).unlink()
        memory(config(story, tmp_path / "run", own_cache))
        assert len(forwards) == (2 if name == "outputs" else 0)


def test_an_unfinished_cache_goes_on_only_where_it_was_begun(
    story: Story, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pass_identity, "processor", lambda device: "another")
    here = memory(config(story, tmp_path / "finished", own_cache))
    (own_cache / "train" / COMPLETE).unlink()
    with pytest.raises(UsageError, match="begun on another kind of machine"):
        memory(config(story, tmp_path / "unfinished", own_cache))
    monkeypatch.undo()
    there = memory(config(story, tmp_path / "live", None))
    assert here["memory_digest"] == there["memory_digest"]


def kd(
    story: Story, run: Path, cache: Path | None, name: str = "kd", **sections: dict[str, Any]
) -> Config:
    """A student of a teacher that is read sample by sample."""
    needs = needs_of(name, story)
    needs["teacher"]["cache"] = None if cache is None else str(cache)
    needs["data"]["augment"] = False
    for section, values in sections.items():
        needs[section] = {**needs.get(section, {}), **values}
    return story.config(run, method={"name": name}, **needs)


@pytest.mark.parametrize(
    ("name", "mode"), [("kd", "class_matched"), ("norm", "paired"), ("jumbot", "unpaired")]
)
def test_a_student_learns_from_the_cache_what_the_live_teacher_teaches(
    story: Story,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mode: str,
) -> None:
    data = {"mode": mode}
    student(kd(story, tmp_path / "live", None, name, data=data), console=False)
    monkeypatch.setattr(company, "open_split_for", None)  # the teacher's samples are not opened
    monkeypatch.setattr(company, "LiveTeacher", None)
    student(kd(story, tmp_path / "cached", written, name, data=data), console=False)
    # Last bits of an output depend on the batch that it was computed in.
    expected = losses(tmp_path / "live")
    assert losses(tmp_path / "cached") == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 12
    # Neither is its run, if it is not named.
    alone = kd(story, tmp_path / "alone", written, name, data=data, teacher={"run": None})
    student(alone, console=False)
    assert losses(tmp_path / "alone") == losses(tmp_path / "cached")


def test_a_missing_cache_is_refused_with_the_command_that_writes_it(
    story: Story, tmp_path: Path
) -> None:
    missing = rf"train holds no outputs.*`cmkd memory .* teacher\.cache={tmp_path}"
    with pytest.raises(UsageError, match=missing):
        student(kd(story, tmp_path / "run", tmp_path), console=False)
    shards = {"run": None, "shards": str(story.shards)}
    with pytest.raises(UsageError, match=r"teacher\.shards names samples for"):
        student(kd(story, tmp_path / "run", tmp_path, teacher=shards), console=False)


def test_samples_that_were_damaged_are_counted_and_never_replaced(
    story: Story, own_story: Story, tmp_path: Path
) -> None:
    lenient = {"max_bad_fraction": 0.05}  # 3 of 60
    damage(own_story, 7, 8)
    cache = tmp_path / "cache"
    live = memory(config(own_story, tmp_path / "live", None, data=lenient))
    for run in ("writes", "reads"):
        found = memory(config(own_story, tmp_path / run, cache, data=lenient))
        assert found["memory_digest"] == live["memory_digest"]
        assert found["metrics"]["memory/skipped"] == 2
    with pytest.raises(IntegrityError, match="lacks 2 of 60 samples"):
        memory(config(own_story, tmp_path / "strict", cache))
    with pytest.raises(IntegrityError, match=r"lacks sample toy-train-00000[78]"):
        student(
            kd(story, tmp_path / "student", cache, data={"mode": "paired"}),
            console=False,
        )
