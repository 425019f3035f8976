"""CREMA-D: acted emotions from names, no actor in two splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.data.datasets.crema_d import CremaD
from cmkd_scale.data.datasets.entries import SPLITS, FileSplit
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import crema_d_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crema_d")
    crema_d_tree(root)
    return root


def opened(root: Path, modality: str, split: str, **options: str) -> FileSplit:
    found = CremaD(root, options).open(modality, split)
    assert isinstance(found, FileSplit)
    return found


def test_folds_test_on_every_actor_once_and_modalities_agree(tree: Path) -> None:
    tested: list[object] = []
    for fold in map(str, range(10)):
        of_split = {
            split: {
                entry.about["actor"] for entry in opened(tree, "audio", split, fold=fold).entries
            }
            for split in SPLITS
        }
        assert 9 <= len(of_split["test"]) <= 10
        assert set.union(*of_split.values()) == set(range(1001, 1092))
        pictures = opened(tree, "image", "test", fold=fold).entries
        assert {entry.about["actor"] for entry in pictures} == of_split["test"]
        tested += of_split["test"]
    assert sorted(map(str, tested)) == [str(actor) for actor in range(1001, 1092)]


def test_labels_are_the_acted_emotions_and_the_silent_file_is_left_out(tree: Path) -> None:
    names = {"ANG": "anger", "SAD": "sad"}
    found = [entry for split in SPLITS for entry in opened(tree, "audio", split).entries]
    label_names = opened(tree, "audio", "train").label_names
    assert label_names == ("anger", "disgust", "fear", "happy", "neutral", "sad")
    for entry in found:
        assert label_names[entry.label] == names[entry.name.split("_")[2]]
    assert len(found) == 2 * 91
    assert "1076_MTI_SAD_XX" not in {entry.name for entry in found}


def test_missing_directory_is_named(tree: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no directory .*AudioWAV/AudioWAV"):
        CremaD(tree / "AudioWAV", {}).open("audio", "train")
