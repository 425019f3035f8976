from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.build import build_memory
from cmkd_scale.training.distillation import Distillation
from tools.bench import _step_variants as variants
from tools.bench import step
from tools.bench._bench import finish

_T = TypeVar("_T")

TINY = variants.Setting(
    classes=4,
    dim=8,
    batch=6,
    width=8,
    depth=1,
    student_shape=(1, 8, 12),
    teacher_shape=(1, 10, 8),
    sizes=(8, 20),
    counted_size=20,
    samples=40,
    built_classes=2,
)


def keeping(make: Callable[..., _T], made: list[_T]) -> Callable[..., _T]:
    """``make``, which adds what it returns to ``made``."""

    def run(*given: Any, **named: Any) -> _T:
        made.append(make(*given, **named))
        return made[-1]

    return run


def test_it_runs_and_writes_rows_and_goals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, goals = step.run(TINY, rounds=1)
    finish(rows, goals, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["rows"]["step"]) == [
        "ce_ls",
        "ce_ls again",
        "ucmkd_global, 8 prototypes",
        "ucmkd_global, 20 prototypes",
        "sumall",
        "bilevel",
    ]
    assert found["rows"]["step"]["ce_ls"]["ratio"] == 1.0
    assert [goal["name"] for goal in found["goals"]] == [
        "whole run of bilevel, over ours with its memory"
    ]
    printed = capsys.readouterr().out
    assert all(name in printed for table in found["rows"].values() for name in table)


def test_the_whole_run_counts_steps_the_pass_and_the_scaled_build() -> None:
    steps = {"ce_ls": 1.0, "ucmkd_global, 20 prototypes": 1.5, "sumall": 2.0, "bilevel": 6.0}
    once = {step.PASS: 0.25, step.BUILD: 3.0}
    total = step.total_costs(
        TINY,
        {name: {"ratio": ratio} for name, ratio in steps.items()},
        {name: {"ratio": ratio} for name, ratio in once.items()},
    )
    # 7 batches an epoch, the last one short; 10 epochs; 2 of 4 classes built.
    assert TINY.steps == 70
    assert total["ucmkd_global, 20 prototypes"] == {
        "memory": 7 * 0.25 + 2 * 3.0,
        "steps": 105.0,
        "total": 112.75,
        "of_ours": 1.0,
    }
    assert total["bilevel"]["total"] == 420.0
    assert total["bilevel"]["of_ours"] == pytest.approx(420 / 112.75)
    assert total["sumall"]["memory"] == 0.0


@pytest.mark.parametrize(("method", "prototypes"), [("ce_ls", None), ("ucmkd_global", 8)])
def test_what_is_timed_is_a_training_step(
    method: str, prototypes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: list[Distillation] = []
    monkeypatch.setattr(variants, "Distillation", keeping(Distillation, modules))
    run = variants.our_step(TINY, method, prototypes)
    (module,) = modules
    before = copy.deepcopy(module.state_dict())
    run()
    after = module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.head.weight" in changed
    assert any(name.startswith("model.encoder") for name in changed)
    # The dual ascent is part of our step.
    assert any("potentials.value" in name for name in changed) == (prototypes is not None)
    assert all(parameter.grad is None for parameter in module.parameters())
    if prototypes is not None:
        assert len(after["targets.0.potentials.value"]) == prototypes


def test_the_memory_that_is_timed_has_the_prototypes_that_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[PrototypeMemory] = []
    monkeypatch.setattr(variants, "build_memory", keeping(build_memory, built))
    variants.memory_build(TINY)()
    (memory,) = built
    assert memory.class_count.tolist() == [10, 10, 0, 0]
    assert len(memory.prototypes) == TINY.counted_size * TINY.built_classes // TINY.classes
