from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmkd_scale.models.model import Model
from tools.bench import teacher_cache
from tools.bench._bench import finish

TINY = teacher_cache.Setting(
    train_per_class=1, teacher_width=8, teacher_depth=1, student_width=8, batch=4
)


def test_it_times_memories_and_steps_of_which_those_from_the_cache_ask_no_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, cache = teacher_cache.Bench(TINY, tmp_path), tmp_path / "cache"
    rows, goals = teacher_cache.run(bench, cache, 1)
    finish(rows, goals, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    again = f"{teacher_cache.LIVE} again"
    assert list(found["rows"]["memory"]) == [
        teacher_cache.LIVE,
        again,
        teacher_cache.WRITTEN,
        teacher_cache.READ,
    ]
    assert list(found["rows"]["student step"]) == [
        teacher_cache.LIVE,
        again,
        teacher_cache.CACHED_STEP,
        teacher_cache.PLAIN_STEP,
    ]
    assert len(found["goals"]) == 3
    passed = []
    real = Model.forward

    def forward(self: Model, inputs: torch.Tensor) -> object:
        passed.append(len(inputs))
        return real(self, inputs)

    monkeypatch.setattr(Model, "forward", forward)
    for source, models in ((None, 2), (cache, 1)):
        step = bench.step("kd", source)
        passed.clear()
        assert step() > 0
        assert passed == [TINY.batch] * models
