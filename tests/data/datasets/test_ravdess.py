"""RAVDESS: emotions from names, no actor in two splits, each take once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cmkd_scale.data.datasets.entries import SPLITS, FileSplit
from cmkd_scale.data.datasets.ravdess import EMOTIONS, Ravdess
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import ravdess_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ravdess")
    ravdess_tree(root)
    return root


def opened(root: Path, modality: str, split: str, **options: str) -> FileSplit:
    found = Ravdess(root, options).open(modality, split)
    assert isinstance(found, FileSplit)
    return found


def actors(split: FileSplit) -> set[object]:
    return {entry.about["actor"] for entry in split.entries}


def test_folds_test_on_every_actor_once_and_modalities_agree(tree: Path) -> None:
    tested: Counter[object] = Counter()
    for fold in map(str, range(6)):
        of_split = {split: actors(opened(tree, "audio", split, fold=fold)) for split in SPLITS}
        assert {split: len(found) for split, found in of_split.items()} == {
            "train": 16,
            "validation": 4,
            "test": 4,
        }
        assert set.union(*of_split.values()) == set(range(1, 25))
        assert sum(isinstance(actor, int) and actor % 2 for actor in of_split["test"]) == 2
        assert actors(opened(tree, "image", "test", fold=fold)) == of_split["test"]
        tested.update(of_split["test"])
    assert set(tested.values()) == {1}
    with pytest.raises(UsageError, match="fold=6"):
        Ravdess(tree, {"fold": "6"})


@pytest.mark.parametrize(
    ("channel", "emotions"),
    [
        ("speech", {"neutral", "angry"}),
        ("song", {"sad"}),
        ("both", {"neutral", "angry", "sad"}),
    ],
)
@pytest.mark.parametrize("modality", ["audio", "image"])
def test_each_take_of_a_channel_is_there_once(
    tree: Path, modality: str, channel: str, emotions: set[str]
) -> None:
    found = opened(tree, modality, "test", channel=channel)
    assert {EMOTIONS[entry.label] for entry in found.entries} == emotions
    assert len(found) == 4 * len(emotions)
    codes = {int(entry.file.rsplit("/", 1)[-1].split("-")[2]) - 1 for entry in found.entries}
    assert codes == {entry.label for entry in found.entries}
    assert found.label_names == EMOTIONS
