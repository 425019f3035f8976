from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json, to_json
from cmkd_scale.operations.export import export
from cmkd_scale.operations.exported import load_exported, read_description
from tests.operations.export_runs import make_run, make_spec


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    make_run(root / "run")
    export(root / "run", format="safetensors", out=root / "out")
    return root / "out"


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(pristine, tmp_path / "out")
    return tmp_path / "out"


def change(out: Path, **values: Any) -> None:
    described = read_json(out / "cmkd.json")
    (out / "cmkd.json").write_bytes(to_json({**described, **values}))


def test_what_is_said_of_it(out: Path) -> None:
    described = read_description(out)
    assert described.spec == make_spec("byte_transformer")
    assert described.modality.shape == (24,)
    exported = load_exported(out)
    assert exported.label_names == ("up", "down", "<b>left|right</b>")
    assert exported.provenance == described.provenance
    assert exported.provenance["method"] == "ce_ls"


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors"])
def test_a_changed_or_missing_file_is_found(out: Path, name: str) -> None:
    content = bytearray((out / name).read_bytes())
    content[-1] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name} does not match its SHA-256"):
        load_exported(out)
    (out / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        load_exported(out)


def test_the_card_may_be_edited(out: Path) -> None:
    (out / "README.md").write_text("mine")
    assert load_exported(out).label_names


@pytest.mark.parametrize(
    "values",
    [
        {"format_version": 2},
        {"format_version": None},
        {"model": {}},
        {"model": []},
        {"files": []},
        {"provenance": 1},
        {"files": {}},
    ],
)
def test_a_description_that_is_none(out: Path, values: dict[str, Any]) -> None:
    change(out, **values)
    with pytest.raises(IntegrityError, match="Export it again"):
        load_exported(out)


@pytest.mark.parametrize("name", ["../run/config.yaml", "/etc/hostname", "a/b"])
def test_a_description_that_names_files_elsewhere(out: Path, name: str) -> None:
    change(out, files={**read_json(out / "cmkd.json")["files"], name: "0"})
    with pytest.raises(IntegrityError, match="a file outside the directory"):
        load_exported(out)


@pytest.mark.parametrize(
    "changed",
    [{"width": 24}, {"label_names": ["one"]}, {"encoder": "features"}, {"depth": 2}, {"x": 1}],
)
def test_a_description_of_another_model(out: Path, changed: dict[str, Any]) -> None:
    change(out, model={**read_json(out / "cmkd.json")["model"], **changed})
    with pytest.raises(IntegrityError, match="does not hold the model"):
        load_exported(out)


def test_damaged_json(out: Path) -> None:
    (out / "cmkd.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"cmkd.json is damaged"):
        load_exported(out)


def test_what_is_no_export(out: Path) -> None:
    make_run(out.parent / "run")
    with pytest.raises(UsageError, match=r"run, not an exported model.*cmkd export .* --out DIR"):
        load_exported(out.parent / "run")
    with pytest.raises(UsageError, match="There is no directory"):
        load_exported(out.parent / "nothing")
    (out / "cmkd.json").unlink()
    with pytest.raises(UsageError, match=r"no exported model: it has no cmkd\.json"):
        load_exported(out)
