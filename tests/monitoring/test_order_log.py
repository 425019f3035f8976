from __future__ import annotations

from pathlib import Path

from cmkd_scale.monitoring.jsonl import read_jsonl
from cmkd_scale.monitoring.order_log import OrderLogFile, cut_back_all


def write(run: Path, rank: int, steps: range) -> None:
    log = OrderLogFile(run, rank)
    for step in steps:
        log.log(step, (f"{rank}-{step}", "b"))
    log.close()


def test_each_step_stands_there_once_after_a_resume_on_another_world(tmp_path: Path) -> None:
    write(tmp_path, 0, range(7))
    write(tmp_path, 1, range(9))  # it had come farther
    cut_back_all(tmp_path, 5)
    write(tmp_path, 0, range(5, 10))
    first, second = (read_jsonl(tmp_path / "order" / f"rank_0000{rank}.jsonl") for rank in (0, 1))
    assert [line["step"] for line in first] == list(range(10))
    assert [line["step"] for line in second] == list(range(5))
    assert first[3]["keys"] == ["0-3", "b"]


def test_a_run_without_any_begins_one(tmp_path: Path) -> None:
    cut_back_all(tmp_path, 0)
    write(tmp_path, 0, range(2))
    assert len(read_jsonl(tmp_path / "order" / "rank_00000.jsonl")) == 2
