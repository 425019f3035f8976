"""Any backend trains the same student, and continues from what any other has written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cmkd_scale.errors import IntegrityError
from cmkd_scale.training.backends import by_parameter
from tests.conftest import REPOSITORY, Launch

SCRIPT = REPOSITORY / "tests" / "scripts" / "spread.py"
BACKENDS = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
DEEPSPEED = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": 1,  # the program puts its own number here
}


def environment(backend: str, directory: Path, **more: Any) -> dict[str, str | None]:
    """What Accelerate's launcher would set for a backend on CPUs."""
    if backend == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **more}
    if not backend.startswith("zero"):
        return dict(more)
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    stage = int(backend[-1])
    # The toy's parameters are so small that stage 3 would not cut them up.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    file = directory / f"{backend}.json"
    file.write_text(json.dumps({**DEEPSPEED, "zero_optimization": zero}))
    return {
        "ACCELERATE_USE_CPU": None,
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        **more,
    }


def spread(
    launch: Launch, backend: str, *arguments: str | Path, processes: int = 2, **env: str
) -> dict[str, Any]:
    """What ``tests/scripts/spread.py`` prints, by what was trained."""
    directory = next((a for a in arguments if isinstance(a, Path)), Path("/tmp"))
    done = launch(
        SCRIPT,
        *arguments,
        processes=1 if backend == "single" else processes,
        env=environment(backend, directory, **env),
        timeout=240,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"backend"'))
    found = json.loads(line)
    assert found["backend"] == backend
    trained: dict[str, Any] = found["trained"]
    return trained


def same(ours: Mapping[str, Any], wanted: Mapping[str, Any], last: int) -> None:
    """Losses of the last steps and weights agree to rounding."""
    assert ours["losses"] == pytest.approx(wanted["losses"][-last:], rel=1e-6)
    assert ours["used"] == pytest.approx(wanted["used"], rel=1e-6)


@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_any_backend_continues_from_what_any_other_has_written(
    tmp_path: Path, launch: Launch
) -> None:
    """36 pairs of a writer and a reader, 2 processes each but for one alone."""
    for backend in BACKENDS:
        whole = spread(launch, backend, "write", tmp_path)[backend]
        if backend == "single":
            undisturbed = whole
        same(whole, undisturbed, last=8)
    for backend in BACKENDS:
        continued = spread(launch, backend, "read", tmp_path)
        assert set(continued) == set(BACKENDS)
        for found in continued.values():
            same(found, undisturbed, last=4)


@pytest.mark.multirank
@pytest.mark.timeout(600)
def test_fifty_steps_do_not_depend_on_processes_or_accumulation(
    launch: Launch,
) -> None:
    wanted = spread(launch, "single", "parts", SPREAD_STEPS="50")
    for processes in (2, 3, 4):
        found = spread(launch, "ddp", "parts", processes=processes, SPREAD_STEPS="50")
        for parts in ("1", "2", "4"):
            same(found[parts], wanted["1"], last=50)
    for parts in ("2", "4"):
        same(wanted[parts], wanted["1"], last=50)


@pytest.mark.multirank
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_accumulation_and_recomputation_where_the_model_is_cut_up(
    backend: str, launch: Launch, tmp_path: Path
) -> None:
    wanted = spread(launch, "single", "parts")["1"]
    found = spread(launch, backend, "parts", tmp_path, SPREAD_RECOMPUTE="1")
    for parts in ("1", "2", "4"):
        same(found[parts], wanted, last=8)


@pytest.mark.multirank
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_a_teacher_beside_the_student_is_no_part_of_what_is_cut_up(
    backend: str, launch: Launch, tmp_path: Path
) -> None:
    # norm has a frozen teacher, and a loss with parameters.
    wanted = spread(launch, "single", "parts", SPREAD_METHOD="norm")["1"]
    found = spread(launch, backend, "parts", tmp_path, SPREAD_METHOD="norm")
    for parts in ("1", "2", "4"):
        same(found[parts], wanted, last=8)


@pytest.mark.multirank
def test_a_bilevel_method_is_refused_where_no_process_is_whole(
    launch: Launch, tmp_path: Path
) -> None:
    env = environment("fsdp2", tmp_path, SPREAD_METHOD="ucmkd_fixed")
    done = launch(SCRIPT, "write", tmp_path, processes=2, env=env, check=False, timeout=240)
    assert done.returncode != 0
    assert "under fsdp2 no process holds them whole" in done.stderr


@pytest.mark.multirank
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_bfloat16_computes_near_float32(backend: str, launch: Launch, tmp_path: Path) -> None:
    wanted = spread(launch, "single", "parts")["1"]["losses"]
    found = spread(launch, backend, "parts", tmp_path, SPREAD_PRECISION="bf16")["1"]["losses"]
    assert found == pytest.approx(wanted, rel=0.05)
    assert found != pytest.approx(wanted, rel=1e-5)  # it was really used


def test_a_state_of_another_model_is_refused() -> None:
    state = {"head.weight/exp_avg": torch.zeros(2), "head.weight/step": torch.zeros(())}
    assert by_parameter(state, {"head.weight": None}) == {
        "head.weight": {"exp_avg": state["head.weight/exp_avg"], "step": torch.zeros(())}
    }
    with pytest.raises(IntegrityError, match=r"no parameter head\.weight here"):
        by_parameter(state, {"head.bias": None})
