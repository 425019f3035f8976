"""VGGSound: the published test split, vanished videos, choice of classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.data.datasets.entries import SPLITS, FileSplit
from cmkd_scale.data.datasets.vggsound import VggSound
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import VGG_LABELS, vggsound_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vggsound")
    vggsound_tree(root)
    return root


def opened(root: Path, split: str, **options: str) -> FileSplit:
    found = VggSound(root, options).open("image", split)
    assert isinstance(found, FileSplit)
    return found


def test_published_split_and_missing_clips(tree: Path) -> None:
    splits = {split: opened(tree, split) for split in SPLITS}
    numbers = {
        split: {int(entry.name[-6:]) for entry in found.entries} for split, found in splits.items()
    }
    assert numbers["test"] == {i for i in range(40, 60) if i % 10 != 9}
    assert numbers["train"] | numbers["validation"] == {i for i in range(40) if i % 10 != 9}
    missing = [found.options["missing"] for found in splits.values()]
    assert missing[2] == 2
    assert missing[0:2] in ([4, 0], [3, 1], [2, 2])
    for found in splits.values():
        for entry in found.entries:
            assert found.label_names[entry.label] == VGG_LABELS[int(entry.name[-6:]) % 3]


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        ("", ("dog barking", "people eating crisps, chips", "zebra braying")),
        ("2", ("dog barking", "people eating crisps, chips")),
        ("zebra braying, dog barking", ("dog barking", "zebra braying")),
        ('"people eating crisps, chips"', ("people eating crisps, chips",)),
    ],
)
def test_classes_are_chosen_by_name_or_number(
    tree: Path, classes: str, labels: tuple[str, ...]
) -> None:
    found = opened(tree, "test", classes=classes)
    assert found.label_names == labels
    assert {entry.label for entry in found.entries} == set(range(len(labels)))
    assert found.options["classes"] == classes


def test_wrong_classes_and_tables_are_named(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no label 'dog bark': did you mean 'dog barking'"):
        opened(tree, "train", classes="dog bark")
    with pytest.raises(UsageError, match="classes=9, but there are 3"):
        opened(tree, "train", classes="9")
    with pytest.raises(UsageError, match=r"vggsound\.csv cannot be read .*robots\.ox"):
        opened(tmp_path, "train")
    for line in ("../x,1,dog,train", "x,1,dog,dev", "x,one,dog,train", "x,1,dog"):
        (tmp_path / "vggsound.csv").write_text(f"abc,1,dog,train\n{line}\n")
        with pytest.raises(UsageError, match="line 2 is not"):
            opened(tmp_path, "train")
    (tmp_path / "vggsound.csv").write_text("abc,1,dog,test\n")
    with pytest.raises(UsageError, match=r"1 missing, such as abc_000001\.mp4"):
        opened(tmp_path, "test")
