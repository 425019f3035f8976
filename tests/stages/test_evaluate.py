"""``cmkd evaluate``: what a student's features mean in the memory's space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cmkd_scale.memory.nearest import nearest
from cmkd_scale.stages import evaluate as module
from cmkd_scale.stages.evaluate import evaluate
from cmkd_scale.stages.student import student
from tests.conftest import Launch
from tests.stages.conftest import Story

COMPARED = [f"test/{name}_accuracy" for name in ("nearest_prototype", "knn", "teacher_head")]
WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
from cmkd_scale.cli import program
program()
"""


@pytest.mark.multirank
def test_a_student_is_compared_with_the_memory_by_all_ranks_and_without_faiss(
    story: Story, tmp_path: Path, launch: Launch
) -> None:
    run, file, script = tmp_path / "run", tmp_path / "student.yaml", tmp_path / "without_faiss.py"
    file.write_text(yaml.safe_dump(story.tree(run)))
    script.write_text(WITHOUT_FAISS)
    student(story.config(run), console=False)
    alone = evaluate(story.config(run))["metrics"]
    assert set(COMPARED) <= alone.keys()
    for processes in (1, 3):  # of 30 samples in one batch, two of three ranks have none
        (run / "evaluation.json").unlink()
        launch(script, "evaluate", "--config", file, processes=processes)
        found = json.loads((run / "evaluation.json").read_text())["metrics"]
        assert {name: found[name] for name in COMPARED} == {name: alone[name] for name in COMPARED}


def test_each_rank_searches_its_own_samples(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student(story.config(tmp_path / "run"), console=False)
    seen: list[object] = []

    def watched(*given: object) -> object:
        seen.append(len(given[1]))  # type: ignore[arg-type]
        return nearest(*given)  # type: ignore[arg-type]

    def everything(*rows: object) -> object:
        seen.append("gathered")
        return rows

    monkeypatch.setattr(module, "nearest", watched)
    monkeypatch.setattr(module, "gather_sorted", everything)
    evaluate(story.config(tmp_path / "run"))
    assert seen == [30, "gathered"]


def test_the_error_bound_is_measured_beside_each_memory(story: Story, tmp_path: Path) -> None:
    memories = {"run": [str(story.memory), str(story.memory)]}
    metrics = student(story.config(tmp_path, memory=memories), console=False)["metrics"]
    assert len(metrics["bound"]) == 2
    for bound in metrics["bound"]:
        terms = ("teacher_term", "label_gap", "transfer_gap")
        risk = bound["risk"]["value"]
        assert sum(bound[term]["value"] for term in terms) == pytest.approx(risk, abs=1e-6)
        assert risk == pytest.approx(metrics["test/cross_entropy"], abs=1e-6)
        for distance in bound["bounds"].values():
            assert distance["value"] >= abs(bound["transfer_gap"]["value"])
        assert set(bound["per_class"]) == {f"class {label}" for label in range(4)}
        assert bound["samples"] == metrics["test/samples"]


def test_of_a_large_split_a_part_says_what_the_bound_is(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BOUND_SAMPLES", 12)
    metrics = student(story.config(tmp_path), console=False)["metrics"]
    assert metrics["test/samples"] == 30
    assert metrics["bound"][0]["samples"] == 10
