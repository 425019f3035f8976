"""Tables of files: columns, splits, and paths that must stay inside."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.data.datasets.csv_table import CsvTable
from cmkd_scale.data.datasets.entries import SPLITS, FileSplit
from cmkd_scale.errors import UsageError
from tests.data.datasets.published import csv_tree, picture


def opened(root: Path, modality: str, part: str, /, **options: str) -> FileSplit:
    found = CsvTable(root, options).open(modality, part)
    assert isinstance(found, FileSplit)
    return found


def table(root: Path, *lines: str) -> Path:
    for name in ("1.jpg", "2.jpg"):
        (root / name).write_bytes(picture(int(name[0])))
    (root / "table.csv").write_text("\n".join(lines))
    return root


def test_lines_are_samples_of_their_modality_with_and_without_label(tmp_path: Path) -> None:
    csv_tree(tmp_path)
    for modality in ("image", "audio", "text", "features"):
        found = opened(tmp_path, modality, "train")
        assert len(found) + len(opened(tmp_path, modality, "validation")) == 16
        labels = {entry.label for entry in found.entries}
        assert labels == {-1, 0, 1}
    texts = opened(tmp_path, "text", "train")
    assert {texts[i].members["txt"][-14:] for i in range(8)} == {b",\nof two lines"}


def test_columns_are_named_by_options(tmp_path: Path) -> None:
    root = table(tmp_path, "picture,kind,part", "1.jpg,x,train", "./2.jpg,y,test")
    (tmp_path / "other.csv").write_text("path\n1.jpg\n")
    options = {"file": "table.csv", "path": "picture", "label": "kind", "split": "part"}
    (entry,) = opened(root, "image", "test", **options).entries
    assert (entry.file, entry.label) == ("2.jpg", 1)
    with pytest.raises(UsageError, match=r"should hold one \.csv \(other\.csv, table\.csv there"):
        opened(root, "image", "test")
    with pytest.raises(UsageError, match="no column 'kinds': did you mean 'kind'"):
        opened(root, "image", "test", **{**options, "label": "kinds"})
    with pytest.raises(UsageError, match=r"file=\.\./table\.csv is not the name"):
        opened(root, "image", "test", file="../table.csv")


def test_without_splits_a_hash_of_path_or_text_splits(tmp_path: Path) -> None:
    lines = [f'"text {i % 100}"' for i in range(200)]  # each text twice
    (tmp_path / "t.csv").write_text("\n".join(["text", *lines]))
    splits = [opened(tmp_path, "text", split) for split in SPLITS]
    assert sum(map(len, splits)) == 200
    shown = [{entry.text for entry in split.entries} for split in splits]
    assert len(set.union(*shown)) == sum(map(len, shown)) == 100
    assert splits[0].label_names == ()
    assert "cls" not in splits[0][0].members


def test_a_line_may_be_a_picture_and_a_text(tmp_path: Path) -> None:
    root = table(tmp_path, "path,text,label,split", "1.jpg,a cat,cat,test", "2.jpg,a dog,dog,test")
    for modality, member in (("image", "jpg"), ("text", "txt")):
        found = opened(root, modality, "test")
        assert [member in found[i].members for i in range(2)] == [True, True]
        assert found.label_names == ("cat", "dog")
    assert CsvTable(root, {"modality": "text"}).modalities == ("text",)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../1.jpg,x,train", "line 3: '../1.jpg' is not a relative path"),
        ("/etc/passwd,x,train", "not a relative path"),
        ("out.jpg,x,train", "not a relative path"),
        ("3.jpg,x,train", "there is no file"),
        ("1.jpg,x,test", "'1.jpg' is in line 2 already"),
        (".//1.jpg,x,test", "'1.jpg' is in line 2 already"),
        ("1.gif,x,train", "cannot be stored as it is"),
        (",x,train", "neither a path nor a text"),
        ("2.jpg,x,tests", "no split 'tests', did you mean 'test'"),
        ("2.jpg,x", "line 3 has 2 values, but the header has 3"),
        ('2.jpg,"x', "line 3: unexpected end of data"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, reason: str) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(picture(0))
    source = tmp_path / "source"
    source.mkdir()
    (source / "out.jpg").symlink_to(outside)
    table(source, "path,label,split", "1.jpg,x,train", line)
    with pytest.raises(UsageError, match=reason):
        opened(source, "image", "train")


def test_two_links_to_a_file_are_not_in_two_splits(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to("1.jpg")
    root = table(tmp_path, "path,split", "1.jpg,test", "link.jpg,train", "2.jpg,train", "2.png,val")
    (tmp_path / "2.png").write_bytes(picture(3, "png"))
    train = opened(root, "image", "train")
    assert [entry.file for entry in train.entries] == ["2.jpg"]
    assert train.options["shared"] == 1
