"""Thousands of damaged splits: never a crash, a hang or a wrong sample, and the right exit code.

Each example changes the files of a real split, decided by its number alone. The digests show
it, so it is known exactly which samples must still be read and which must be refused.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from cmkd_scale.data.adopt import adopt
from cmkd_scale.data.manifest import MANIFEST, load_manifest
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.data.verify import verify
from cmkd_scale.errors import (
    IntegrityError,
    UsageError,
)
from tests.data.fuzz_checks import (
    check_lenient_training,
    check_samples,
    check_strict_training,
    example,
    same_content,
)
from tests.data.fuzz_splits import (
    PER_SHARD,
    SAMPLES,
    FuzzSplit,
    random_of,
)
from tests.data.mutations import CHANGES, damaged
from tests.data.tar_mutations import Files

pytestmark = pytest.mark.usefixtures("limit")


def check_damage(split: FuzzSplit, files: Files) -> None:
    """The whole promise: what is readable is read, the rest is refused, reported, and ends
    a run that allows no damage."""
    unchanged = same_content(files.get(MANIFEST), split.pristine[MANIFEST])
    whole = unchanged and all(files.get(n) == c for n, c in split.pristine.items() if n != MANIFEST)
    if MANIFEST not in files:
        for open_ in (load_manifest, verify):
            with pytest.raises(UsageError, match="no shards"):
                open_(split.directory)
        return
    assert bool(verify(split.root)) == (not whole)
    if not unchanged:
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            load_manifest(split.directory)
        return
    manifest = load_manifest(split.directory)
    assert manifest == split.manifest
    readable = split.readable(files)
    with contextlib.closing(SampleReader(manifest, split.reads.wants)) as reader:
        check_samples(split, reader, readable)
        check_lenient_training(split, reader, readable)
        check_strict_training(split, reader, readable)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(160), id="quick"),
        pytest.param(range(160, 1600), id="thorough", marks=pytest.mark.slow),
    ],
)
def test_damaged_files_are_never_read_as_data(splits: list[FuzzSplit], numbers: range) -> None:
    for number in numbers:
        split = splits[number % len(splits)]
        files, changes = damaged(random_of("damage", number), split.pristine, CHANGES)
        with example(split, files, f"example {number}: {changes}"):
            check_damage(split, files)


def test_whole_files_are_read_whole(splits: list[FuzzSplit]) -> None:
    for split in splits:
        with example(split, split.pristine, "as built"):
            assert split.readable(split.pristine) == set(range(SAMPLES))
            check_damage(split, split.pristine)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param(range(40), id="quick"),
        pytest.param(range(40, 400), id="thorough", marks=pytest.mark.slow),
    ],
)
def test_tars_of_another_origin_are_indexed_whole_or_refused(
    splits: list[FuzzSplit], tmp_path: Path, numbers: range
) -> None:
    """Without a digest only the headers say what a tar holds: what they cannot say is refused."""
    for number in numbers:
        split = splits[number % len(splits)]
        rng = random_of("adopt", number)
        tar = bytearray(split.pristine["shard-000000.tar"])
        for _ in range(rng.choice([0, 1, 3])):
            at = rng.randrange(len(tar))
            tar[at : at + rng.choice([1, 1, 600])] = rng.choice([rng.randbytes(1), bytes(600)])
        path = tmp_path / str(number)
        path.mkdir()
        (path / "one.tar").write_bytes(tar[: rng.choice([None, rng.randrange(len(tar))])])
        try:
            manifest = adopt(path, name="other", modality=split.manifest.modality, split="train")
        except (IntegrityError, UsageError):
            continue
        reader = SampleReader(manifest)
        found = [reader.key(place) for place in range(len(reader))]
        assert found == [sample.key for sample in split.samples[:PER_SHARD]], f"example {number}"
        assert verify(path) == []
