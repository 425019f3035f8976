"""Damage with digests that fit it, as a forger would make: our errors at most, in little memory."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmkd_scale.data.adopt import adopt
from cmkd_scale.data.damage import REASONS, DamagedError, Quarantine
from cmkd_scale.data.manifest import Manifest, load_manifest
from cmkd_scale.data.sample_index import index_bytes
from cmkd_scale.data.shards import lost_shards
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.tar_walk import index_tar
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import CmkdError, IntegrityError, UsageError
from tests.data.forged_members import FORGED, PICKLE
from tests.data.fuzz_checks import (
    check_lenient_training,
    check_strict_training,
    example,
    first_batch,
)
from tests.data.fuzz_splits import (
    READERS,
    SAMPLES,
    FuzzSplit,
    random_of,
)
from tests.data.mutations import FORGERIES, damaged, restate

pytestmark = pytest.mark.usefixtures("limit")


def check_forgery(split: FuzzSplit) -> None:
    """Samples or our errors, in reasonable memory."""
    with contextlib.suppress(CmkdError):
        verify(split.root)
    try:
        manifest = load_manifest(split.directory)
    except (IntegrityError, UsageError):
        return
    with contextlib.suppress(IntegrityError):
        read_forgery(split, manifest)


def read_forgery(split: FuzzSplit, manifest: Manifest) -> None:
    for _, error in lost_shards(manifest):  # as a run does at its start
        raise error
    with contextlib.closing(SampleReader(manifest, split.reads.wants)) as reader:
        for found in reader.read(np.arange(min(len(reader), 2 * SAMPLES))):
            assert not isinstance(found, DamagedError) or found.reason in REASONS
        for allowed in (1.0, 0.0):
            quarantine = Quarantine(len(reader), max_bad_fraction=allowed)
            batch = first_batch(reader, split, quarantine)
            assert batch.inputs.isfinite().all()
        assert len(reader.labels()) == len(reader)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(80), id="quick"),
        pytest.param(range(80, 900), id="thorough", marks=pytest.mark.slow),
    ],
)
def test_forged_digests_lead_to_our_errors_at_most(splits: list[FuzzSplit], numbers: range) -> None:
    for number in numbers:
        split = splits[number % len(splits)]
        files, changes = damaged(random_of("forgery", number), split.pristine, FORGERIES)
        restate(files)
        with example(split, files, f"example {number}: {changes}"):
            check_forgery(split)


@pytest.mark.parametrize(
    ("modality", "name"), [(modality, name) for modality in FORGED for name in FORGED[modality]]
)
def test_a_forged_member_is_set_aside_alone(
    splits: list[FuzzSplit],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modality: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    split = splits[list(READERS).index(modality)]
    place = 5
    files = split.with_member(place, *FORGED[modality][name])
    url, index = split.shard_of(place), str(split.manifest.shards[1].index)
    (tmp_path / url).write_bytes(files[url])
    files[index] = index_bytes(index_tar(tmp_path / url))
    (tmp_path / url).unlink()
    restate(files)
    with example(split, files, name):
        assert verify(split.root) == []
        manifest = load_manifest(split.directory)
        with contextlib.closing(SampleReader(manifest, split.reads.wants)) as reader:
            rest = set(range(SAMPLES)) - {place}
            check_lenient_training(split, reader, rest)
            check_strict_training(split, reader, rest)
    assert list(tmp_path.iterdir()) == [], "it was unpickled, or evaluated"


@pytest.mark.parametrize("extension", ["pickle", "pkl", "pyd", "pt", "npz", "txt.pickle", "so"])
def test_members_of_other_types_are_refused_whatever_an_index_says(
    splits: list[FuzzSplit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    monkeypatch.chdir(tmp_path)
    split = splits[0]
    files = split.with_member(5, extension, PICKLE)
    (tmp_path / "one.tar").write_bytes(files[split.shard_of(5)])
    with pytest.raises(IntegrityError, match="unknown type"):
        adopt(tmp_path, name="other", modality="text", split="train")
    claimed = replace(split.indexes[1], extensions=("cls", "json", extension))
    files[str(split.manifest.shards[1].index)] = index_bytes(claimed)
    restate(files)
    with example(split, files, extension):
        manifest = load_manifest(split.directory)
        with contextlib.closing(SampleReader(manifest)) as reader:
            found = list(reader.read(np.arange(4, 8)))
        assert all(isinstance(one, DamagedError) and "unknown type" in str(one) for one in found)
        assert [problem.path.name for problem in verify(split.root)] == [split.shard_of(5)]
    assert [path.name for path in tmp_path.iterdir()] == ["one.tar"]
