"""Tars of another origin: what the real webdataset wrote is read here, in place."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from cmkd_scale.cli import main
from cmkd_scale.data.adopt import adopt
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import IntegrityError, UsageError


def write(path: Path, numbers: range, *, labels: int = 3) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            writer.write(
                {"__key__": f"n/{number:04d}", "txt": f"text {number}", "cls": number % labels}
            )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for shard in range(4):
        write(tmp_path / f"part-{shard}.tar", range(5 * shard, 5 * shard + 5))
    return tmp_path


@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_tars_of_webdataset_are_read_as_they_are(directory: Path, workers: int) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    seen: list[tuple[int, int]] = []
    manifest = adopt(
        directory,
        name="mine",
        modality="text",
        split="train",
        label_names=["red", "green", "blue"],
        workers=workers,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert manifest.class_counts == (7, 7, 6)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    reader = SampleReader(manifest)
    for number, sample in enumerate(reader.read(np.arange(20))):
        assert not isinstance(sample, Exception)
        assert (sample.key, sample.label) == (f"n/{number:04d}", number % 3)
        assert sample.members["txt"] == f"text {number}".encode()
    assert verify(directory) == []


def test_the_program_indexes_and_streams(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = directory / "names.txt"
    names.write_text("red\ngreen\nblue\n")
    arguments = ["--modality", "text", "--labels", str(names), "--workers", "0", "--json"]
    assert main(["shards", "index", str(directory), *arguments]) == 0
    row = json.loads(capsys.readouterr().out)["splits"][0]
    assert (row["samples"], row["shards"], row["classes"]) == (20, 4, 3)
    stream = [
        "shards",
        "stream",
        str(directory),
        "--rank",
        "0",
        "--world-size",
        "1",
        "--print-keys",
    ]
    for sampling in ("natural", "balanced"):
        assert main([*stream, "--sampling", sampling]) == 0
        keys = capsys.readouterr().out.split()
        assert len(keys) == 20
        if sampling == "natural":
            assert sorted(keys) == [f"n/{number:04d}" for number in range(20)]
    assert main([*stream, "--samples", "unlabelled"]) == 2
    assert "is empty" in capsys.readouterr().err


def test_what_cannot_be_adopted_is_said(directory: Path) -> None:
    def attempt(**options: object) -> None:
        adopt(directory, name="x", modality="text", split="train", **options)  # type: ignore[arg-type]

    with pytest.raises(UsageError, match="class 2, and 2 names"):
        attempt(label_names=["a", "b"])
    write(directory / "part-9.tar", range(3, 4))
    with pytest.raises(IntegrityError, match=r"twice in part-0\.tar, part-9\.tar"):
        attempt()
    (directory / "part-9.tar").unlink()
    with tarfile.open(directory / "part-8.tar", "w") as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(IntegrityError, match=r"part-8\.tar.*a link"):
        attempt()
    (directory / "part-8.tar").unlink()
    attempt()
    with pytest.raises(UsageError, match="has a manifest"):
        attempt()
    (directory / "manifest.json").unlink()
    write(directory / "a b.tar", range(99, 100))
    with pytest.raises(UsageError, match=r"'a b\.tar'.*rename it"):
        attempt()
    with pytest.raises(UsageError, match="no shards"):
        adopt(directory / "nowhere", name="x", modality="text", split="train")
