"""Shards on disk: the same bytes each time, all of them or none, and readable by others."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from cmkd_scale.data.build import build
from cmkd_scale.data.damage import DamagedError
from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.data.manifest import manifest_digest
from cmkd_scale.data.sample_index import SampleIndex, index_bytes, read_index
from cmkd_scale.data.shards import (
    UNREADABLE,
    Manifest,
    find_manifests,
    load_manifest,
    lost_shards,
    map_index,
    resolve,
)
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.tar_walk import index_tar
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest
from cmkd_scale.records import UNLABELLED, Sample

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Toy:
    """A data set and its split at once: texts of three classes, every fifth without a label."""

    size: int = 23
    made: list[int] = field(default_factory=list)
    letter: str = "x"
    name = "toy"
    modalities = ("text",)
    splits = ("train", "test")
    label_names = ("red", "green", "blue")

    @property
    def options(self) -> Mapping[str, JsonValue]:
        return {"letter": self.letter}

    def open(self, modality: str, split: str) -> Toy:
        return self

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Sample:
        self.made.append(i)
        members = {"txt": self.letter.encode() * (i * 37), "json": b'{"i": %d}' % i}
        label = UNLABELLED if i % 5 == 4 else i % 3
        if label != UNLABELLED:
            members["cls"] = str(label).encode()
        return Sample(key=f"toy-{i:06d}", label=label, members=members)


def make(
    out: Path, toy: Toy | None = None, split: str = "train", samples_per_shard: int = 7
) -> Manifest:
    return build(
        toy or Toy(), out, modality="text", split=split, samples_per_shard=samples_per_shard
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def indexes_of(manifest: Manifest) -> list[SampleIndex]:
    return [map_index(manifest, number) for number in range(len(manifest.shards))]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make(tmp_path / "out")


def test_manifest_says_what_the_data_set_holds(manifest: Manifest) -> None:
    toy = Toy()
    labels = [toy[i].label for i in range(len(toy))]
    assert manifest.samples == len(toy)
    assert [shard.nsamples for shard in manifest.shards] == [7, 7, 7, 2]
    assert manifest.class_counts == tuple(labels.count(c) for c in range(3))
    assert manifest.label_names == toy.label_names
    assert manifest.options == {"letter": "x"}
    assert (manifest.dataset, manifest.modality, manifest.split) == ("toy", "text", "train")
    assert verify(manifest.directory) == []


def test_index_leads_to_every_member(manifest: Manifest) -> None:
    toy, place = Toy(), 0
    for number, shard in enumerate(manifest.shards):
        index = map_index(manifest, number)
        assert index.extensions == ("cls", "json", "txt")
        content = (manifest.directory / shard.url).read_bytes()
        for row in range(len(index)):
            sample = toy[place]
            assert index.key(row) == sample.key
            assert index.labels[row] == sample.label
            found = {
                extension: content[offset : offset + size]
                for extension, offset, size in zip(
                    index.extensions, index.offset[row], index.size[row], strict=True
                )
                if size >= 0
            }
            assert found == sample.members
            place += 1
    assert place == len(toy)


def test_samples_are_read_by_their_place(manifest: Manifest) -> None:
    toy = Toy()
    with contextlib.closing(SampleReader(manifest)) as reader:
        assert reader.labels().tolist() == [toy[i].label for i in range(len(toy))]
        for place in np.random.default_rng(0).permutation(len(toy)).tolist():
            assert reader.key(place) == toy[place].key
            assert reader[place] == toy[place]


def test_shards_are_plain_tars_without_a_trace_of_the_machine(manifest: Manifest) -> None:
    with tarfile.open(manifest.directory / manifest.shards[0].url) as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o444)}
    assert [m.name for m in members[:3]] == [f"toy-000000.{e}" for e in ("cls", "json", "txt")]
    header = (manifest.directory / manifest.shards[0].url).read_bytes()[:512]
    assert header[257:265] == b"ustar\x0000"


# Both readers leave closing their files to the garbage collector.
LEAVES_FILES_OPEN = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@LEAVES_FILES_OPEN
def test_webdataset_reads_the_same_samples(manifest: Manifest) -> None:
    import webdataset

    urls = [str(manifest.directory / shard.url) for shard in manifest.shards]
    toy = Toy()
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == len(toy)
    for i, found in enumerate(read):
        assert found["__key__"] == toy[i].key
        assert {k: v for k, v in found.items() if k[0] != "_"} == toy[i].members
    gc.collect()


@LEAVES_FILES_OPEN
def test_wids_reads_the_same_samples(manifest: Manifest, tmp_path: Path) -> None:
    import wids

    read = wids.ShardListDataset(
        str(manifest.directory / "manifest.json"),
        cache_dir=str(tmp_path / "wids"),
        transformations=[],
    )
    toy = Toy()
    assert len(read) == len(toy)
    for i in range(len(toy)):
        found = read[i]
        assert found["__key__"] == toy[i].key
        members = {k[1:]: v.read() for k, v in found.items() if k[0] == "."}
        assert members == toy[i].members
    read.close()
    del read, found
    gc.collect()


# A program that builds shards of number texts and can kill itself at a sample, so that the
# build ends as it would when a machine is switched off.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS

out, kill_at, log = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

class Split:
    def __init__(self, inner):
        self.inner, self.label_names, self.options = inner, inner.label_names, inner.options
    def __len__(self):
        return len(self.inner)
    def __getitem__(self, i):
        if i == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            print(i, file=file)
        return self.inner[i]

class Dataset:
    inner = DATASETS["numbers"](None, {"n_per_class": "1"})
    name, modalities, splits = inner.name, inner.modalities, inner.splits
    def open(self, modality, split):
        return Split(self.inner.open(modality, split))

build(Dataset(), out, modality="text", split="train", samples_per_shard=30)
"""


def run_program(tmp_path: Path, kill_at: int, hash_seed: int) -> int:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, program, tmp_path / "killed", str(kill_at), tmp_path / "log"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": str(hash_seed)},
        check=False,
        timeout=120,
    ).returncode


@pytest.mark.slow
def test_killed_build_leaves_nothing_to_accept_and_goes_on(tmp_path: Path) -> None:
    numbers = DATASETS["numbers"](None, {"n_per_class": "1"})
    whole = build(numbers, tmp_path / "whole", modality="text", split="train", samples_per_shard=30)
    assert run_program(tmp_path, kill_at=75, hash_seed=2) == -signal.SIGKILL
    killed = tmp_path / "killed"
    partial = killed / "text" / "train.partial"
    assert [path.name for path in (killed / "text").iterdir()] == [partial.name]
    assert find_manifests(killed) == []
    for directory in (killed, killed / "text", partial):
        with pytest.raises(UsageError, match="unfinished"):
            verify(directory)
        with pytest.raises(UsageError, match="unfinished"):
            resolve(directory, split="train")
        with pytest.raises(UsageError, match="no shards"):
            load_manifest(directory)

    (tmp_path / "log").unlink()
    assert run_program(tmp_path, kill_at=-1, hash_seed=3) == 0
    made = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert made == list(range(60, 100))  # two shards of 30 were finished
    assert contents(killed / "text" / "train") == contents(whole.directory)
    assert verify(killed) == []


@pytest.mark.parametrize("stop_after", ["plan.json", "shard-000001.tar", "manifest.json"])
def test_build_goes_on_from_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: str
) -> None:
    whole = contents(make(tmp_path / "whole").directory)
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert find_manifests(tmp_path / "out") == []
    with pytest.raises(UsageError, match="unfinished"):
        resolve(tmp_path / "out", split="train")
    with pytest.raises(UsageError, match="letter='x' there, 'y' now"):
        make(tmp_path / "out", Toy(letter="y"))
    assert contents(make(tmp_path / "out").directory) == whole


def test_damaged_unfinished_shard_is_made_again(tmp_path: Path) -> None:
    whole = contents(make(tmp_path / "whole").directory)

    class Killed(Toy):
        def __getitem__(self, i: int) -> Sample:
            if i == 15:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", Killed())
    tar = tmp_path / "out" / "text" / "train.partial" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"!")
    toy = Toy()
    assert contents(make(tmp_path / "out", toy).directory) == whole
    assert toy.made == [*range(7), *range(14, 23)]


def test_finished_build_is_left_alone(manifest: Manifest) -> None:
    toy = Toy()
    times = {path: path.stat().st_mtime_ns for path in manifest.directory.iterdir()}
    again = make(manifest.directory.parents[1], toy)
    assert again == manifest
    assert toy.made == []
    assert {path: path.stat().st_mtime_ns for path in manifest.directory.iterdir()} == times


def test_build_refuses_what_was_built_otherwise(manifest: Manifest) -> None:
    out = manifest.directory.parents[1]
    with pytest.raises(UsageError, match="letter='x' there, 'y' now"):
        make(out, Toy(letter="y"))
    with pytest.raises(UsageError, match="samples_per_shard=7 there, 8 now"):
        make(out, samples_per_shard=8)
    (manifest.directory / manifest.shards[1].url).unlink()
    with pytest.raises(IntegrityError, match=r"shard-000001\.tar cannot be opened \(No such file"):
        make(out)


def test_two_builds_at_once_make_one(tmp_path: Path) -> None:
    toys = [Toy(size=200), Toy(size=200)]
    with ThreadPoolExecutor() as pool:
        manifests = list(pool.map(lambda toy: make(tmp_path, toy), toys))
    assert manifests[0] == manifests[1]
    assert sorted(toys[0].made + toys[1].made) == list(range(200))
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "sample",
    [
        Sample("a.b", 0, {"cls": b"0"}),
        Sample("", 0, {"cls": b"0"}),
        Sample("a" * 91, 0, {"cls": b"0"}),
        Sample("a", 3, {"cls": b"3"}),
        Sample("a", 0, {"cls": b"1"}),
        Sample("a", 0, {"txt": b"no label"}),
        Sample("a", UNLABELLED, {"cls": b"0"}),
    ],
)
def test_adapter_that_makes_misleading_samples_is_refused(tmp_path: Path, sample: Sample) -> None:
    class Misleading(Toy):
        def __getitem__(self, i: int) -> Sample:
            return sample

    with pytest.raises(ValueError, match="keys take letters"):
        make(tmp_path, Misleading(size=1))


def test_repeated_keys_are_found(tmp_path: Path) -> None:
    class Repeating(Toy):
        def __getitem__(self, i: int) -> Sample:
            return Sample(f"toy-{i % 7}", 0, {"cls": b"0"})

    manifest = make(tmp_path / "across", Repeating())
    assert "toy-0" in verify(manifest.directory)[0].reason


def damage_flip(directory: Path) -> Path:
    path = directory / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def damage_truncate(directory: Path) -> Path:
    path = directory / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    return path


def damage_remove(directory: Path) -> Path:
    (directory / "shard-000000.tar").unlink()
    return directory / "shard-000000.tar"


def damage_index(directory: Path) -> Path:
    path = directory / "shard-000003.index.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    return path


def damage_stray(directory: Path) -> Path:
    shutil.copy(directory / "shard-000000.tar", directory / "shard-000009.tar")
    return directory / "shard-000009.tar"


def damage_manifest(directory: Path) -> Path:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"red"', '"rad"'))
    return path


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_truncate,
        damage_remove,
        damage_index,
        damage_stray,
        damage_manifest,
    ],
)
def test_verify_names_what_is_damaged(manifest: Manifest, damage: Callable[[Path], Path]) -> None:
    path = damage(manifest.directory)
    assert [problem.path for problem in verify(manifest.directory.parents[1])] == [path]


def restate(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its digest right again, as a forger would."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["cmkd"]["digest"] = manifest_digest(content)
    path.write_text(json.dumps(content))


def claim_sample(content: dict[str, Any]) -> None:
    content["shardlist"][0]["nsamples"] += 1
    content["cmkd"]["samples"] += 1


def claim_label(content: dict[str, Any]) -> None:
    counts = content["shardlist"][0]["class_counts"]
    counts["red"], counts["blue"] = counts["red"] + 1, counts["blue"] - 1
    total = content["cmkd"]["class_counts"]
    total[0], total[2] = total[0] + 1, total[2] - 1


def claim_shard(content: dict[str, Any]) -> None:
    content["shardlist"].append({**content["shardlist"][0], "url": "other.tar"})
    for name, count in content["shardlist"][0]["class_counts"].items():
        content["cmkd"]["class_counts"][content["cmkd"]["label_names"].index(name)] += count
    content["cmkd"]["samples"] += content["shardlist"][0]["nsamples"]


def claim_other_tar(content: dict[str, Any]) -> None:
    """Index of shard 1 for shard 0, which has as many samples."""
    for name in ("index", "index_sha256"):
        content["shardlist"][0][name] = content["shardlist"][1][name]


@pytest.mark.parametrize("change", [claim_sample, claim_label, claim_shard, claim_other_tar])
def test_verify_finds_false_claims(
    manifest: Manifest, change: Callable[[dict[str, Any]], None]
) -> None:
    restate(manifest.directory, change)
    assert verify(manifest.directory)


def test_unfinished_split_beside_a_finished_one_is_a_problem(manifest: Manifest) -> None:
    partial = manifest.directory.with_name("test.partial")
    partial.mkdir()
    assert [problem.path for problem in verify(manifest.directory.parents[1])] == [partial]


def test_shard_of_others_is_read_by_its_headers(manifest: Manifest) -> None:
    before = indexes_of(manifest)

    def forget(content: dict[str, Any]) -> None:
        for shard in content["shardlist"]:
            (manifest.directory / shard["index"]).unlink()
            shard["index"] = shard["index_sha256"] = None

    restate(manifest.directory, forget)
    assert indexes_of(load_manifest(manifest.directory)) == before
    assert verify(manifest.directory) == []


def replace(path: Path, content: bytes) -> None:
    """By another file: what is mapped into memory must not become shorter."""
    path.unlink()
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = path.read_bytes()
    replace(path, content[:-1] + bytes([content[-1] ^ 1]))


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[:-1])


def empty(path: Path) -> None:
    replace(path, b"")


def exchange(path: Path) -> None:
    """The index of the next shard."""
    replace(path, path.with_name("shard-000001.index.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [remove, flip, truncate, empty, exchange])
def test_a_damaged_index_is_made_again_in_memory(
    manifest: Manifest, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before, labels = indexes_of(manifest), SampleReader(manifest).labels()
    path = manifest.directory / str(manifest.shards[0].index)
    damage(path)
    left = contents(manifest.directory)
    with caplog.at_level(logging.WARNING):
        assert indexes_of(manifest) == before
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "shard-000000.tar cannot be used" in caplog.text
    with contextlib.closing(SampleReader(manifest)) as reader:
        assert reader.labels().tolist() == labels.tolist()
        assert reader[3] == Toy()[3]
    assert contents(manifest.directory) == left  # nothing is written


@pytest.mark.parametrize(
    ("damage", "reason", "message"),
    [
        (flip, "wrong_shard", "SHA-256 differs"),
        (truncate, "wrong_shard", "bytes instead of"),
        (remove, "missing_shard", "cannot be opened"),
    ],
)
def test_an_index_is_not_made_of_a_damaged_shard(
    manifest: Manifest, damage: Callable[[Path], None], reason: str, message: str
) -> None:
    shard = manifest.shards[2]
    remove(manifest.directory / str(shard.index))
    damage(manifest.directory / shard.url)
    with pytest.raises(DamagedError, match=rf"shard-000002\.tar .*{message}") as caught:
        map_index(manifest, 2)
    assert caught.value.reason == reason
    map_index(manifest, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (claim_sample, "7 samples instead of 8"),
        (claim_label, "other class counts"),
        (claim_other_tar, "other class counts"),
    ],
)
def test_an_index_that_contradicts_the_manifest_is_refused(
    manifest: Manifest, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    restate(manifest.directory, change)
    with pytest.raises(DamagedError, match=rf"shard-000000\.tar contradicts.*{message}") as caught:
        map_index(load_manifest(manifest.directory), 0)
    assert caught.value.reason == "wrong_index"


def test_lost_shards_are_found_without_reading_them(manifest: Manifest) -> None:
    assert list(lost_shards(manifest)) == []
    for number, damage in ((0, remove), (1, flip), (3, truncate)):
        damage(manifest.directory / manifest.shards[number].url)
    lost = dict(lost_shards(manifest))
    assert {number: error.reason for number, error in lost.items()} == {
        0: "missing_shard",
        3: "wrong_shard",
    }
    for number, error in lost.items():
        assert manifest.shards[number].url in str(error)


def test_members_of_one_sample_may_be_missing_and_their_order_free(tmp_path: Path) -> None:
    path = tmp_path / "foreign.tar"
    names = ["d/", "d/a.007.png", "d/a.cls", "d/b.txt", "c.cls", "c.txt"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            (tmp_path / "payload").write_bytes(b"5")
            info.size = 0 if name.endswith("/") else 1
            with (tmp_path / "payload").open("rb") as payload:
                tar.addfile(info, payload)
    index = index_tar(path)
    assert list(index.keys()) == ["d/a", "d/b", "c"]
    assert index.extensions == ("007.png", "cls", "txt")
    assert index.labels.tolist() == [5, UNLABELLED, 5]
    assert (index.size >= 0).tolist() == [[True, True, False], [False, False, True], [0, 1, 1]]


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 64, b"\x1f\x8b" + b"\0" * 600])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"shard\.tar"):
        index_tar(path)


def test_resolve_takes_root_modality_or_split(tmp_path: Path) -> None:
    train = make(tmp_path / "out").directory
    test = make(tmp_path / "out", split="test").directory
    for root in (tmp_path / "out", tmp_path / "out" / "text"):
        assert resolve(root, split="train") == train
        assert resolve(root, split="test", modality="text") == test
    assert resolve(train, split="train") == train
    assert find_manifests(tmp_path / "out") == [test, train]
    with pytest.raises(UsageError, match="did you mean 'train'"):
        resolve(tmp_path / "out", split="trian")
    with pytest.raises(UsageError, match="no split 'test'"):
        resolve(train, split="test")
    with pytest.raises(UsageError, match="did you mean 'text'"):
        resolve(tmp_path / "out", split="train", modality="texts")
    with pytest.raises(UsageError, match="does not exist"):
        resolve(tmp_path / "nothing", split="train")
    shutil.copytree(train.parent, tmp_path / "out" / "copy")
    restate(
        tmp_path / "out" / "copy" / "train",
        lambda content: content["cmkd"].update(modality="image"),
    )
    restate(
        tmp_path / "out" / "copy" / "test", lambda content: content["cmkd"].update(modality="image")
    )
    with pytest.raises(UsageError, match="image, text"):
        resolve(tmp_path / "out", split="train")
    assert resolve(tmp_path / "out", split="train", modality="text") == train


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make(tmp_path_factory.mktemp("fuzz"))


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [path, *(found for key, child in children for found in paths_of(child, (*path, key)))]


def accepted(directory: Path) -> bool:
    """Whether manifest, indexes and shards fit; anything but the two errors fails the test."""
    try:
        manifest = load_manifest(directory)
        indexes_of(manifest)
    except (UsageError, IntegrityError):
        return False
    return not list(lost_shards(manifest))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_malformed_manifest_raises_only_our_errors(fuzzed: Manifest, data: st.DataObject) -> None:
    path = fuzzed.directory / "manifest.json"
    original = path.read_bytes()
    content = json.loads(original)
    where = data.draw(st.sampled_from(paths_of(content)[1:]))
    parent: Any = content
    for key in where[:-1]:
        parent = parent[key]
    before = json.dumps(parent[where[-1]])
    parent[where[-1]] = data.draw(JSON)
    if data.draw(st.booleans()) and isinstance(content["cmkd"], dict):
        content["cmkd"]["digest"] = manifest_digest(content)
    try:
        path.write_text(json.dumps(content))
        harmless = where[0] == "name" or where[:2] in (
            ("cmkd", "dataset"),
            ("cmkd", "modality"),
            ("cmkd", "split"),
            ("cmkd", "options"),
            ("cmkd", "label_names"),
            ("cmkd", "samples_per_shard"),
            ("cmkd", "digest"),
        )
        # The digest of a tar is read by `verify` only.
        unread = where[-1] == "sha256"
        if accepted(fuzzed.directory):
            assert harmless or unread or json.dumps(parent[where[-1]]) == before
    finally:
        path.write_bytes(original)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=64)
    | st.text(max_size=32).map(str.encode)
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_as_manifest_raise_only_our_errors(fuzzed: Manifest, content: bytes) -> None:
    path = fuzzed.directory / "manifest.json"
    original = path.read_bytes()
    try:
        path.write_bytes(content)
        assert not accepted(fuzzed.directory)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_deep_or_long_manifests_raise_only_our_errors(manifest: Manifest, content: bytes) -> None:
    (manifest.directory / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        load_manifest(manifest.directory)


def read_index_at(path: Path) -> SampleIndex:
    with path.open("rb") as file:
        return read_index(file.fileno())


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_indexes_and_tars_raise_only_our_errors(
    fuzzed: Manifest, tmp_path: Path, data: st.DataObject
) -> None:
    shard = fuzzed.shards[0]
    for name, read in ((str(shard.index), read_index_at), (shard.url, index_tar)):
        content = bytearray((fuzzed.directory / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            # Headers are where a parser can be misled.
            place = data.draw(st.integers(0, min(len(content), 2048) - 1))
            content[place] = data.draw(st.integers(0, 255))
        path = tmp_path / name
        path.write_bytes(content[: data.draw(st.integers(len(content) - 600, len(content)))])
        try:
            read(path)
        except (*UNREADABLE, IntegrityError) as error:
            # Who maps an index puts its name to whatever this raises.
            assert name == shard.index or name in str(error)  # noqa: PT017


def test_index_survives_its_file(manifest: Manifest, tmp_path: Path) -> None:
    index = index_tar(manifest.directory / manifest.shards[0].url)
    path = tmp_path / "index.safetensors"
    path.write_bytes(index_bytes(index))
    assert read_index_at(path) == index
    assert file_digest(path) == manifest.shards[0].index_sha256
    assert index.offset.dtype == np.int64
