from __future__ import annotations

import os
from pathlib import Path

import pytest

from cmkd_scale.errors import UsageError
from cmkd_scale.models.hub import find_files
from tests.models.backbones import save_backbone


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    files = find_files(str(save_backbone("vit", tmp_path)), None)
    assert files.directory == tmp_path
    assert files.revision is None
    digest = files.weights_digest()
    assert digest == files.weights_digest()
    save_backbone("vit", tmp_path, seed=1)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert files.weights_digest() != digest


def test_a_cached_model_is_found_by_id_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    save_backbone("vit", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        files = find_files("someone/tiny", revision)
        assert files.directory == repository / "snapshots" / commit
        assert files.revision == commit
    with pytest.raises(UsageError, match="hub does not give it"):
        find_files("someone/tiny", "v2")


def test_what_is_not_to_be_had_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hub does not give it.*hf download someone/else"):
        find_files("someone/else", None)
    with pytest.raises(UsageError, match="neither a directory here nor a hub's id"):
        find_files("a/b/c/d", None)
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        find_files(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model\.revision is of a hub's id"):
        find_files(str(tmp_path), "main")


def test_weights_that_can_run_code_are_refused(tmp_path: Path) -> None:
    save_backbone("vit", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin\)\. Only safetensors are read"):
        find_files(str(tmp_path), None).weights_digest()
