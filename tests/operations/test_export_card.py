from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cmkd_scale.operations.export import export
from cmkd_scale.operations.export_card import write_card
from cmkd_scale.operations.exported import read_description
from tests.models.backbones import save_backbone
from tests.operations.export_runs import make_backbone_run, make_run


def test_a_published_model_that_it_began_from(tmp_path: Path) -> None:
    save_backbone("vit", tmp_path / "hub")
    make_backbone_run(tmp_path / "run", {"backbone": str(tmp_path / "hub")}, "image")
    export(tmp_path / "run", format="safetensors", out=tmp_path / "out")
    described = read_description(tmp_path / "out")
    assert described.spec.backbone is not None
    assert described.spec.backbone.source is None  # a directory of this machine
    published = replace(described.spec.backbone, source="google/vit-small")
    card = write_card(
        replace(described, spec=replace(described.spec, backbone=published)),
        license_id=None,
        snippets=[],
    )
    assert front_matter(card)["base_model"] == "google/vit-small"
    assert "| base model | that of `google/vit-small` |" in card
    assert "The processor whose files lie here" in card


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def card_of(tmp_path: Path, license_id: str | None = None, **facts: Any) -> str:
    """The card of an export whose provenance is changed."""
    if not (tmp_path / "out").is_dir():
        make_run(tmp_path / "run")
        export(tmp_path / "run", format="safetensors", out=tmp_path / "out")
    described = read_description(tmp_path / "out")
    changed = replace(described, provenance={**described.provenance, **facts})
    return write_card(changed, license_id=license_id, snippets=[])


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["cross-modal-knowledge-distillation"],
    }
    assert "Results\n\nNone are on record" in card
    assert "| weights | unknown |" in card
    assert "| training data | unknown |" in card
    assert "It had no teacher." in card
    assert "Error bound" not in card


DATA = {"dataset": "ravdess", "name": "ravdess-audio-train", "manifest": "ab", "samples": 12}
MEASURED = {"by": "student", "split": "test", "finished": "2026-01-01T00:00:00Z"}


def test_results_and_licences_that_are_known(tmp_path: Path) -> None:
    card = card_of(
        tmp_path, "cc-by-nc-sa-4.0", data=DATA, metrics={"test/accuracy": 0.75}, measured=MEASURED
    )
    head = front_matter(card)
    assert head["license"] == "cc-by-nc-sa-4.0"
    assert "datasets" not in head  # of the Hub, which this name is not
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"type": "ravdess", "name": "ravdess", "split": "test"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75}]
    assert "| accuracy | 0.7500 |" in card
    assert "| weights | `cc-by-nc-sa-4.0` |" in card
    assert "the notes of `cmkd_scale.data.datasets.ravdess` say whose it is" in card
    assert "No control is on record" in card


@pytest.mark.parametrize(
    ("trust", "said"), [(0.0, "left it out"), (0.5, "| the guard's trust in teacher 1 | 0.500")]
)
def test_the_guards_verdict(tmp_path: Path, trust: float, said: str) -> None:
    teacher = {"modality": "image", "weights": "w", "steps": 3, "shards": "s", "manifest": "m"}
    card = card_of(tmp_path, teachers=[teacher], guard=[{"trust": trust, "agreement": None}])
    assert "a prototype memory, left by a teacher of `image`" in card
    assert said in card
    assert ("left it out" in card) == (trust == 0)


def test_a_teacher_that_ran_beside_it(tmp_path: Path) -> None:
    card = card_of(tmp_path, live_teacher="d1", pairs="paired")
    assert "A teacher ran beside it, on samples paired with its own." in card
    assert "| digest of the live teacher | `d1` |" in card


def test_names_out_of_files_are_no_markup(tmp_path: Path) -> None:
    card = card_of(tmp_path, data={**DATA, "dataset": "a`b|c\n# d: e"})
    body = card.split("---\n", 2)[2]
    assert "| data set | `a'b\\|c # d: e` |" in body
    assert re.findall(r"^# .*$", body, re.MULTILINE) == ["# `a'b|c # d: e text ce_ls`"]
    assert "`<b>left|right</b>`" in body  # a class name
