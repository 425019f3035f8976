"""FSDD: the published test recordings, labels from names."""

from __future__ import annotations

from pathlib import Path

from cmkd_scale.data.build import build
from cmkd_scale.data.datasets.entries import FileSplit
from cmkd_scale.data.datasets.fsdd import Fsdd
from tests.data.datasets.published import fsdd_tree


def test_indexes_decide_the_split(tmp_path: Path) -> None:
    fsdd_tree(tmp_path)
    expected = {"test": {"0", "4"}, "validation": {"5", "9"}, "train": {"10"}}
    for source in (tmp_path, tmp_path / "recordings"):
        for split, indexes in expected.items():
            found = Fsdd(source, {}).open("audio", split)
            keys = [found[i].key for i in range(len(found))]
            assert {key.split("_")[2] for key in keys} == indexes
            assert [int(key[0]) for key in keys] == [found[i].label for i in range(len(found))]


def test_real_recordings_have_the_published_split(fsdd: Path, tmp_path: Path) -> None:
    sizes = {}
    for split in ("train", "validation", "test"):
        found = Fsdd(fsdd, {}).open("audio", split)
        assert isinstance(found, FileSplit)
        sizes[split] = len(found)
    assert sizes == {"train": 2400, "validation": 300, "test": 300}
    manifest = build(
        Fsdd(fsdd, {}), tmp_path, modality="audio", split="validation", samples_per_shard=200
    )
    assert manifest.class_counts == (30,) * 10
