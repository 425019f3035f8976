from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.config import make_config
from tools.bench import plan
from tools.bench.plan import FULL, QUICK, Case


@pytest.mark.parametrize("case", [*QUICK, *FULL], ids=lambda case: case.name)
def test_every_configuration_is_one(case: Case) -> None:
    config = make_config(case.tree(Path("run"), Path("memory")))
    assert (config.memory.run is not None) == (case.stage == "student")
    parts = config.train.gradient_accumulation_steps
    assert config.train.global_batch_size % (parts * case.ranks) == 0
    assert config.train.checkpoint_every_steps < config.train.steps


def test_each_backend_has_its_launcher() -> None:
    assert len(plan.launcher(1, "ddp")) == 1
    assert "--multi_gpu" in plan.launcher(2, "ddp")
    for backend in ("fsdp2", "zero2", "zero3"):
        files = [Path(word) for word in plan.launcher(2, backend) if backend in word]
        assert [file.is_file() for file in files] == [True]
    assert plan.environment("zero2")["DS_ACCELERATOR"] == "cpu"
    assert "ACCELERATE_USE_CPU" not in plan.environment("zero2")
    assert plan.environment("fsdp2")["ACCELERATE_USE_CPU"] == "true"


def test_goals_are_distances_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "memory_ratio": 1.1,
        "beyond_ratio": 0.5,
        "time_ratio": 0.7,
        "planned_mib": 110.0,
        "mib": 100.0,
        "planned_seconds": 7.0,
        "seconds": 10.0,
    }
    met = {goal.name: goal.met for goal in plan.goals_of({"resnet": row})}
    assert met == {"resnet: memory, off by": True, "resnet: time, off by": False}
    plan.show({"resnet": row})
    assert "1.10" in capsys.readouterr().out
