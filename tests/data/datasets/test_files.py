"""Names, keys and hash splits; files that are not what they are called."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.data.datasets.files import (
    carve_validation,
    inside,
    list_files,
    make_keys,
    read_stored,
    split_by_hash,
)
from cmkd_scale.errors import IntegrityError


@given(st.lists(st.text(max_size=120), unique=True, max_size=20))
def test_any_names_get_valid_keys_of_their_own(names: list[str]) -> None:
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    # An empty name has no letter to keep; no adapter has one.
    pairs = zip(keys, names, strict=True)
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,90}", key) for key, name in pairs if name)


def test_keys_are_close_to_names() -> None:
    names = ["train/cat/1.jpg", "a b.wav", "a-b.wav", "7_jackson_32"]
    first, second, third, last = make_keys(names)
    assert (first, last) == ("train-cat-1", "7_jackson_32")
    assert second != third
    assert all(re.fullmatch("a-b-[0-9a-f]{12}", key) for key in (second, third))


def test_hash_splits_have_their_shares_and_do_not_depend_on_other_files() -> None:
    names = [f"class/{i}.jpg" for i in range(4000)]
    splits = [split_by_hash(name) for name in names]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert splits.count(split) / 4000 == pytest.approx(share, abs=0.02)
    carved = [carve_validation(name) for name in names]
    assert [a for a, b in zip(splits, carved, strict=True) if b == "validation"] == [
        "validation"
    ] * carved.count("validation")


def test_links_and_names_that_lead_out_are_not_inside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (source / "link.txt").symlink_to(tmp_path / "secret.txt")
    (source / "sub" / "out").symlink_to(tmp_path)
    (source / "circle").symlink_to("circle")
    (source / "good.txt").symlink_to("sub/real.txt")
    for name in ("../secret.txt", "/etc/passwd", "link.txt", "sub/out/secret.txt", "", "a\0b"):
        assert not inside(source, name), name
    assert not inside(source, "sub/../../secret.txt")
    assert inside(source, "good.txt")
    assert inside(source, "sub/new.txt")


def test_files_are_listed_sorted_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.jpg", "a.jpg", ".x.jpg", ".git/3.jpg", "b/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_files(tmp_path, ("jpg",)) == ["a.jpg", "b/1.jpg", "b/2.JPG"]


def saved(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jpg", b"", "it is empty"),
        ("a.jpg", b"<html>not found</html>", "does not begin as a file of image"),
        ("a.wav", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.flac", b"RIFF", "does not begin as a file of audio"),
        ("a.txt", b"\xff\xfe", "decode"),
        ("a.npy", saved([{"an": "object"}]), "array of Python objects"),
        ("a.npy", saved(np.zeros(9))[:-1], "71 bytes instead of 72"),
        ("a.npy", b"PK\x03\x04 an npz", "magic"),
        ("a.npy", b"\x80\x04K\x01.", "magic|EOF|read"),
    ],
)
def test_files_that_no_decoder_takes_are_named(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name} cannot be used: .*({reason})"):
        read_stored(tmp_path / name)


def test_good_files_are_read_with_a_lower_case_extension(tmp_path: Path) -> None:
    jpeg = b"\xff\xd8\xff\xe0 and so on"
    for name, content, extension in (
        ("a.JPEG", jpeg, "jpg"),
        ("b.png", jpeg, "png"),  # decoders look at the content
        ("c.NPY", saved(np.arange(3)), "npy"),
        ("d.txt", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode(), "txt"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_stored(tmp_path / name) == (extension, content)
    with pytest.raises(IntegrityError, match=r"gone\.jpg cannot be used"):
        read_stored(tmp_path / "gone.jpg")
