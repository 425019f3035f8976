"""The id of a run against what the systems that take it allow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.run_id import run_id

# https://kubernetes.io/docs/concepts/overview/working-with-objects/labels
KUBERNETES_LABEL = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")


def test_a_directory_keeps_its_id(tmp_path: Path) -> None:
    directory = tmp_path / "student_3"
    directory.mkdir()
    made = run_id(directory)
    assert re.fullmatch(r"student_3-[0-9a-f]{8}", made)
    assert run_id(directory) == made
    assert (directory / "run_id").read_text() == f"{made}\n"
    moved = directory.rename(tmp_path / "kept")
    assert run_id(moved) == made
    assert [file.name for file in moved.iterdir()] == ["run_id"]


def test_directories_of_one_name_differ(tmp_path: Path) -> None:
    twins = [tmp_path / parent / "run" for parent in "ab"]
    for twin in twins:
        twin.mkdir(parents=True)
    assert run_id(twins[0]) != run_id(twins[1])


@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
    .filter(lambda text: text not in (".", ".."))
    .filter(lambda text: len(text.encode()) < 256)
)
def test_any_name_gives_an_id_that_kubernetes_takes(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    directory = tmp_path_factory.mktemp("run") / name
    directory.mkdir()
    made = run_id(directory)
    assert KUBERNETES_LABEL.fullmatch(made)
    assert 9 < len(made) <= 63


@pytest.mark.parametrize("content", [b"", b"two words\n", b"-a\n", b"\xff\n", b"a" * 64])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run_id").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"run_id is damaged.*delete it"):
        run_id(tmp_path)
    assert (tmp_path / "run_id").read_bytes() == content
