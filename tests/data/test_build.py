"""Several processes build the same bytes, and a build that fails loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.data.build import build
from cmkd_scale.records import Sample
from tests.data.examples import Toy, ToySplit

pytestmark = pytest.mark.slow  # processes take seconds to start


class Failing(Toy):
    """Cannot make sample 40."""

    def open(self, modality: str, split: str) -> ToySplit:
        return FailingSplit(split, self.count, self.classes)


class FailingSplit(ToySplit):
    def __getitem__(self, index: int) -> Sample:
        if index == 40:
            raise ValueError("no sample 40")
        return super().__getitem__(index)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def make(dataset: Toy, out: Path, workers: int, seen: list[int] | None = None) -> Path:
    manifest = build(
        dataset,
        out,
        modality="text",
        split="train",
        samples_per_shard=8,
        workers=workers,
        progress=lambda done, total: None if seen is None else seen.append(done),
    )
    return manifest.directory


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    seen: list[int] = []
    alone = contents(make(Toy(), tmp_path / "alone", 0))
    assert contents(make(Toy(), tmp_path / "three", 3, seen)) == alone
    assert seen == sorted(seen)
    assert seen[-1] == 60


def test_what_was_built_before_a_failure_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample 40"):
        make(Failing(), tmp_path, 2)
    partial = tmp_path / "text" / "train.partial"
    assert not (tmp_path / "text" / "train").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert "shard-000005.tar" not in kept
    assert kept
    finished = make(Toy(), tmp_path, 2)
    for name, time in kept.items():
        assert (finished / name).stat().st_mtime_ns == time, "it was made again"
