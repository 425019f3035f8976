"""Directories of classes, with and without directories of splits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cmkd_scale.data.datasets.entries import SPLITS, FileSplit
from cmkd_scale.data.datasets.folder import AudioFolder, ImageFolder
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import audio_folder_tree, image_folder_tree


def opened(root: Path, split: str) -> FileSplit:
    found = ImageFolder(root, {}).open("image", split)
    assert isinstance(found, FileSplit)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    image_folder_tree(tmp_path)
    return tmp_path


def test_directories_are_splits_and_classes(tree: Path) -> None:
    for split, directory, count in (("train", "train", 17), ("validation", "val", 16)):
        found = opened(tree, split)
        assert len(found) == count
        assert found.label_names == ("cat", "dög")
        for entry in found.entries:
            assert entry.file.split("/")[:2] == [directory, found.label_names[entry.label]]
    extensions = {key for i in range(16) for key in opened(tree, "test")[i].members}
    assert extensions == {"jpg", "png", "webp", "cls", "json"}


def test_keys_of_files_that_differ_in_extension_differ(tree: Path) -> None:
    keys = [key for key in opened(tree, "train").keys if key.startswith("train-cat-0")]
    assert len(set(keys)) == 2


def test_validation_is_carved_from_training_never_from_test(tree: Path) -> None:
    tested = opened(tree, "test").keys
    for i in range(100):
        shutil.copy(tree / "val" / "cat" / "0.JPG", tree / "train" / "cat" / f"more{i}.jpg")
    before = {entry.file for entry in opened(tree, "train").entries}
    shutil.rmtree(tree / "val")
    train, validation = (
        {entry.file for entry in opened(tree, split).entries} for split in ("train", "validation")
    )
    assert train | validation == before
    assert 2 <= len(validation) <= 25
    assert opened(tree, "test").keys == tested
    assert "validation a hash's 10% of train" in str(opened(tree, "train").options["splits"])
    shutil.rmtree(tree / "test")
    with pytest.raises(UsageError, match="holds no image for the split test"):
        opened(tree, "test")


def test_two_validation_directories_are_refused(tree: Path) -> None:
    (tree / "valid").mkdir()
    with pytest.raises(UsageError, match="two directories of the split validation, val and valid"):
        opened(tree, "train")


def test_without_split_directories_a_hash_splits(tmp_path: Path) -> None:
    audio_folder_tree(tmp_path)
    dataset = AudioFolder(tmp_path, {})
    splits = {split: dataset.open("audio", split) for split in SPLITS}
    assert sum(map(len, splits.values())) == 120
    assert len(splits["train"]) > 80
    assert {split.options["splits"] for split in splits.values()} == {"hash 80% 10% 10%"}
    tested = {splits["test"][i].key for i in range(len(splits["test"]))}
    (tmp_path / "bark" / "new.wav").write_bytes((tmp_path / "bark" / "0.wav").read_bytes())
    found = AudioFolder(tmp_path, {}).open("audio", "test")
    assert tested <= {found[i].key for i in range(len(found))}
