"""CrisisMMD: labels of pictures and texts apart, tweets in one split, directories found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cmkd_scale.data.datasets.crisis_mmd import CrisisMmd
from cmkd_scale.data.datasets.entries import FileSplit
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import crisis_mmd_tree

SPLITS = "crisismmd_datasplit_all"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    crisis_mmd_tree(tmp_path)
    return tmp_path


def opened(root: Path, modality: str, split: str, **options: str) -> FileSplit:
    found = CrisisMmd(root, options).open(modality, split)
    assert isinstance(found, FileSplit)
    return found


def test_pictures_and_texts_have_their_own_labels(tree: Path) -> None:
    names = ("affected_individuals", "not_humanitarian", "vehicle_damage")
    images, texts = (opened(tree, modality, "validation") for modality in ("image", "text"))
    assert images.label_names == texts.label_names == names
    assert (len(images), len(texts)) == (12, 6)
    for entry in images.entries:
        tweet, number = map(int, entry.name.split("_"))
        assert (tweet % 3, entry.label) == (1, tweet // 3 % 2 + number)
    for i in range(len(texts)):
        tweet = int(texts.keys[i])
        assert (tweet % 3, texts[i].label) == (1, tweet // 3 % 2)
        text = texts[i].members["txt"].decode()
        assert text == f'RT @x: "tweet {tweet} \N{HEAVY BLACK HEART}'


def test_tweets_of_the_test_split_are_left_out_of_training(tree: Path) -> None:
    for modality in ("image", "text"):
        train = opened(tree, modality, "train")
        assert train.options["shared"] == 1
        assert "2" not in {entry.group for entry in train.entries}


def test_directories_are_found_inside_and_beside(tree: Path) -> None:
    beside = opened(tree, "image", "train")
    assert opened(tree / "CrisisMMD_v2.0", "image", "train").keys == beside.keys
    shutil.move(tree / SPLITS, tree / "CrisisMMD_v2.0" / SPLITS / SPLITS)
    inside = opened(tree / "CrisisMMD_v2.0", "image", "train")
    assert inside.keys == beside.keys
    assert inside.options == beside.options
    assert opened(tree, "image", "train")[0] == beside[0]


def test_damage_has_pictures_only(tree: Path) -> None:
    for name in ("train", "dev", "test"):
        lines = ["event_name\ttweet_id\timage_id\ttweet_text\timage\tlabel"]
        image = f"data_image/{name}.jpg"
        (tree / "CrisisMMD_v2.0" / image).write_bytes(b"\xff\xd8\xff")
        lines.append(f"fire\t{name}\t{name}_0\ttext\t{image}\tsevere_damage")
        (tree / SPLITS / f"task_damage_text_img_{name}.tsv").write_text("\r\n".join(lines))
    found = opened(tree, "image", "train", task="damage")
    assert found.label_names == ("severe_damage",)
    assert found.keys == ("train_0",)
    with pytest.raises(UsageError, match="no modality 'text'"):
        opened(tree, "text", "train", task="damage")


def test_what_is_wrong_is_said(tree: Path) -> None:
    with pytest.raises(UsageError, match=r"no .*task_informative_text_img_train\.tsv inside or"):
        opened(tree, "text", "train", task="informative")
    table = tree / SPLITS / "task_humanitarian_text_img_test.tsv"
    good = table.read_text().splitlines()
    for line, reason in (
        (good[1].replace("data_image/", "/etc/"), "line 2: '/etc/.*not the relative path"),
        (good[1].replace("data_image/", "../../"), "not the relative path"),
        ("too\tfew", "line 2 does not have a value"),
    ):
        table.write_text("\n".join([good[0], line]))
        with pytest.raises(UsageError, match=reason):
            opened(tree, "image", "train")
    table.write_text("tweet\n")
    with pytest.raises(UsageError, match=r"test\.tsv has no column event_name, tweet_id"):
        opened(tree, "image", "train")
