from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.memory import spool as spool_module
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch, part_tensors
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.memory.sync import agree_on_batches
from tests.conftest import Launch
from tests.memory.examples import (
    batches_of,
    build_with,
    first_of_each_class,
    spool_of,
    teacher_data,
)

FEATURES, LABELS, WEIGHT, BIAS = teacher_data()
LIMIT = 11


@pytest.fixture
def batches() -> list[PassedBatch]:
    return batches_of(FEATURES, LABELS, limit=LIMIT)


def parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*"))


@given(
    order=st.permutations(list(range(9))),
    cuts=st.sets(st.integers(0, 8)),
    bounds=st.lists(st.integers(0, 6), max_size=3),
)
def test_no_order_and_no_cut_into_parts_changes_what_is_read(
    order: list[int], cuts: set[int], bounds: list[int]
) -> None:
    batches = batches_of(FEATURES, LABELS, limit=LIMIT)
    spool = Spool(8)
    for place, number in enumerate(order):
        spool.add(batches[number])
        if place in cuts:
            spool.flush()
    spool.flush()
    kept = first_of_each_class(LABELS, LIMIT)
    edges = sorted({0, 6, *bounds})
    for first, stop in itertools.pairwise(edges):
        positions, labels, features = spool.read_kept(first, stop)
        inside = (first <= LABELS) & (stop > LABELS)
        assert sorted(positions.tolist()) == (inside & kept).nonzero()[:, 0].tolist()
        assert torch.equal(labels, LABELS[positions])
        assert torch.equal(features, FEATURES[positions])
        rest = spool.read_rest(first, stop)
        for label in range(first, stop):
            others = FEATURES[(label == LABELS) & ~kept].double().numpy()
            assert int(rest.count[label - first]) == len(others)
            np.testing.assert_allclose(rest.mean()[label - first], others.mean(0), atol=1e-6)
    counts = spool.counts(6)
    assert counts[0].tolist() == [LIMIT] * 6
    assert (counts[0] + counts[1]).tolist() == LABELS.bincount().tolist()


@given(order=st.permutations(list(range(9))), cuts=st.sets(st.integers(0, 8)))
def test_the_memory_has_the_same_bits_for_any_order_and_cut(
    order: list[int], cuts: set[int]
) -> None:
    batches = batches_of(FEATURES, LABELS, limit=LIMIT)
    spool = Spool(8)
    for place, number in enumerate(order):
        spool.add(batches[number])
        if place in cuts:
            spool.flush()
    spool.flush()
    reference = build_with(spool_of(batches), WEIGHT, BIAS)
    assert build_with(spool, WEIGHT, BIAS).digest() == reference.digest()


def test_a_directory_gives_the_same_memory_and_goes_when_it_is_removed(
    batches: list[PassedBatch], tmp_path: Path
) -> None:
    stored = spool_of(batches, tmp_path / "pass")
    assert len(parts(tmp_path / "pass")) == 4
    reference = build_with(spool_of(batches), WEIGHT, BIAS)
    assert build_with(stored, WEIGHT, BIAS).digest() == reference.digest()
    again = Spool(8, tmp_path / "pass")
    assert again.take_up().tolist() == list(range(9))
    assert build_with(again, WEIGHT, BIAS).digest() == reference.digest()
    again.remove()
    assert not (tmp_path / "pass").exists()


def test_parts_are_cut_by_batches_and_by_bytes(
    batches: list[PassedBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value, expected in (("PART_BATCHES", 4, 3), ("_PART_BYTES", 1000, 5)):
        with monkeypatch.context() as patch:
            patch.setattr(spool_module, name, value)
            spool = Spool(8, tmp_path / name)
            for batch in batches:
                spool.add(batch)
            spool.flush()
            spool.flush()  # nothing to write
        assert len(parts(tmp_path / name)) == expected


def test_parts_of_another_pass_are_removed(batches: list[PassedBatch], tmp_path: Path) -> None:
    spool_of(batches, tmp_path)
    other = Spool(8, tmp_path, "another teacher")
    assert other.take_up().tolist() == []
    assert other.counts(6)[0].sum() == 0
    assert parts(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_part_is_passed_again(
    batches: list[PassedBatch], tmp_path: Path, damage: str
) -> None:
    spool_of(batches, tmp_path)
    victim = parts(tmp_path)[1]
    content = victim.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    damages = {"flip": flipped, "cut": content[:-8], "empty": b"", "text": b"x" * 200}
    victim.write_bytes(damages[damage])
    again = Spool(8, tmp_path)
    finished = again.take_up().tolist()
    assert len(parts(tmp_path)) == 3
    assert 0 < len(finished) < 9
    for batch in batches:
        if batch.number not in finished:
            again.add(batch)
    again.flush()
    reference = build_with(spool_of(batches), WEIGHT, BIAS)
    assert build_with(again, WEIGHT, BIAS).digest() == reference.digest()


def test_every_flipped_byte_of_a_part_is_noticed(
    batches: list[PassedBatch], tmp_path: Path
) -> None:
    spool = Spool(8, tmp_path)
    spool.add(batches[0])
    spool.flush()
    (file,) = parts(tmp_path)
    content = file.read_bytes()
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        assert Spool(8, tmp_path).take_up().tolist() == []
    file.write_bytes(content)
    assert Spool(8, tmp_path).take_up().tolist() == [0]


def test_a_part_goes_when_a_sample_that_it_lacks_is_there_again(
    batches: list[PassedBatch], tmp_path: Path
) -> None:
    lacking = dataclasses.replace(batches[0], missing=torch.tensor([77]))
    spool = Spool(8, tmp_path)
    for batch in (lacking, batches[1]):
        spool.add(batch)
        spool.flush()
    asked: list[list[int]] = []

    def still_missing(positions: torch.Tensor) -> bool:
        asked.append(positions.tolist())
        return not len(positions)

    assert Spool(8, tmp_path).take_up(lambda positions: True).tolist() == [0, 1]
    assert Spool(8, tmp_path).take_up(still_missing).tolist() == [1]
    assert sorted(asked) == [[], [77]]
    assert len(parts(tmp_path)) == 1


def test_parts_that_repeat_batches_are_not_counted_twice() -> None:
    stored = {3: torch.tensor([0, 1]), 5: torch.tensor([1, 2]), 9: torch.tensor([2])}
    accepted, finished = agree_on_batches(stored)
    assert accepted == {3, 9}
    assert finished.tolist() == [0, 1, 2]


def test_half_written_parts_of_killed_writers_are_removed(
    batches: list[PassedBatch], tmp_path: Path
) -> None:
    spool_of(batches, tmp_path)
    (tmp_path / ".part-0123.safetensors.4711.tmp").write_bytes(b"half")
    assert Spool(8, tmp_path).take_up().tolist() == list(range(9))
    assert not list(tmp_path.glob(".*"))


def test_missing_samples_are_counted(batches: list[PassedBatch], tmp_path: Path) -> None:
    lacking = dataclasses.replace(batches[0], missing=torch.tensor([77, 78]))
    spool = spool_of([lacking, *batches[1:]], tmp_path)
    again = Spool(8, tmp_path)
    again.take_up()
    assert spool.missing() == again.missing() == 2


@pytest.mark.parametrize("classes", [2, 6, 40, 2000])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_part_takes_no_more_space_than_its_samples(classes: int, share: float) -> None:
    generator = torch.Generator().manual_seed(classes)
    features = torch.randn(160, 64, generator=generator)
    labels = torch.randint(classes, (160,), generator=generator)
    kept = torch.rand(160, generator=generator) < share
    positions = torch.arange(160)
    batch = PassedBatch(0, positions, labels, features, kept, torch.zeros(0, dtype=torch.int64))
    tensors = part_tensors([batch], 64)
    # Beside the features a place and a class for each sample, at most, and one batch number.
    assert sum(rows.nbytes for rows in tensors.values()) <= 160 * (4 * 64 + 24) + 16
    spool = Spool(64)
    spool.add(batch)
    spool.flush()
    rest = spool.read_rest(0, classes)
    expected = Moments(classes, 64)
    expected.update(features[~kept], labels[~kept])
    for one, other in zip(rest.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(spool.counts(classes)[1], expected.count)


FAILING = """
import sys
import tempfile
import torch.distributed as dist
from pathlib import Path
from cmkd_scale import distributed
from cmkd_scale.errors import CmkdError, IntegrityError
from cmkd_scale.memory.spool import Spool
from tests.memory.examples import batches_of, spool_of, teacher_data
dist.init_process_group("gloo")
features, labels, _, _ = teacher_data()
def still_missing(positions):
    if distributed.rank() == 1:
        raise IntegrityError("unreadable")
    return True
with tempfile.TemporaryDirectory() as directory:
    spool_of(batches_of(features, labels), Path(directory))
    try:
        Spool(8, Path(directory)).take_up(still_missing)
    except CmkdError as error:
        print(f"code {error.exit_code}\\n", end="", flush=True)
distributed.leave()
distributed.end(0)
"""


@pytest.mark.multirank
def test_a_failure_while_parts_are_read_ends_all_ranks(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = launch(script, processes=2)
    assert done.stdout.split("\n")[:-1] == ["code 42"] * 2


def test_a_diverged_teacher_is_refused_when_the_batch_comes(batches: list[PassedBatch]) -> None:
    features = batches[0].features.clone()
    features[3, 2] = float("nan")
    with pytest.raises(IntegrityError, match="diverged"):
        Spool(8).add(dataclasses.replace(batches[0], features=features))


def test_a_directory_that_cannot_be_written(batches: list[PassedBatch], tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("a file")
    spool = Spool(8, tmp_path / "pass")
    spool.add(batches[0])
    with pytest.raises(UsageError, match="cannot be written"):
        spool.flush()


def test_a_class_is_a_slice_of_a_part(batches: list[PassedBatch]) -> None:
    part = part_tensors(batches, 8)
    for label, begin, end in zip(
        part["classes"].tolist(), part["starts"][:-1], part["starts"][1:], strict=True
    ):
        assert set(LABELS[part["positions"][begin:end]].tolist()) == {label}
