"""AVE: the published splits, events cut out, videos with several events."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.data.audio import read_sound
from cmkd_scale.data.datasets.ave import Ave
from cmkd_scale.data.datasets.entries import FileSplit
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.datasets.published import ave_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    ave_tree(tmp_path / "AVE_Dataset")
    return tmp_path


def opened(root: Path, modality: str, split: str, **options: str) -> FileSplit:
    found = Ave(root, options).open(modality, split)
    assert isinstance(found, FileSplit)
    return found


def test_rows_are_samples_but_for_missing_empty_and_shared_ones(tree: Path) -> None:
    train = opened(tree, "audio", "train")
    assert sorted(train.keys) == [
        "-a_train_0_1_Male-speech-man-speaking",
        "RUhOCu3LNXM_0_1_Church-bell",
        "twice_0_1_Bark",
        "twice_1_2_Church-bell",
    ]
    assert (train.options["missing"], train.options["shared"]) == (1, 1)
    assert train.label_names == ("Bark", "Church bell", "Male speech, man speaking")
    for i in range(len(train)):
        sample = train[i]
        name = train.label_names[sample.label].replace(",", "").replace(" ", "-")
        assert sample.key.endswith(name)
    assert {entry.group for entry in opened(tree, "image", "test").entries} == {"test1", "shared"}


@pytest.mark.parametrize(("cut", "seconds"), [("event", {1.0, 2.0}), ("clip", {2.0})])
def test_sound_is_that_of_the_event_or_of_the_clip(
    tree: Path, cut: str, seconds: set[float]
) -> None:
    split = opened(tree, "audio", "validation", cut=cut, sample_rate="8000")
    sounds = [read_sound(split[i].members["wav"], 10) for i in range(len(split))]
    assert {rate for _, rate in sounds} == {8000}
    assert {round(len(samples) / 8000, 1) for samples, _ in sounds} == seconds
    if cut == "clip":
        # Without cutting, an event of no length is a clip like others.
        assert "nothing" in {
            entry.group for entry in opened(tree, "audio", "train", cut=cut).entries
        }


def test_options_that_decide_nothing_are_not_recorded(tree: Path) -> None:
    assert {"cut", "frames", "size"} <= set(opened(tree, "image", "train").options)
    assert "sample_rate" not in opened(tree, "image", "train").options
    assert {"frames", "size"}.isdisjoint(opened(tree, "audio", "train").options)


def test_damaged_videos_and_tables_are_named(tree: Path) -> None:
    directory = tree / "AVE_Dataset"
    (directory / "AVE" / "test1.mp4").write_bytes(b"truncated")
    split = opened(tree, "image", "test")
    with pytest.raises(IntegrityError, match=r"AVE/test1\.mp4 cannot be used"):
        split[[entry.group for entry in split.entries].index("test1")]
    for line, reason in (
        ("Bark&../../etc/passwd&good&0&1", "line 2 is not"),
        ("Bark&x&good&0", "line 2 is not"),
        ("Bark&x&good&0&nan", "impossible time"),
        ("Meow&x&good&0&1", "category 'Meow'"),
    ):
        (directory / "testSet.txt").write_text(f"Bark&test1&good&0&1\n{line}\n")
        with pytest.raises(UsageError, match=rf"testSet\.txt.*{reason}"):
            opened(tree, "image", "test")
    (directory / "testSet.txt").unlink()
    with pytest.raises(UsageError, match=r"testSet\.txt cannot be read .*AVE-ECCV18"):
        opened(tree, "image", "test")
