"""Faults, counted by hand from logs of known increments and totals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_faults import Faults, read_faults
from cmkd_scale.monitoring.report_runs import load_runs
from tests.monitoring.test_report_runs import Page, make_run


def logged(run: Path, records: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    make_run(run, **more)
    lines = [json.dumps({"step": 10 * n, **record}) for n, record in enumerate(records, start=1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def faults(run: Path) -> Faults:
    [found] = read_faults(load_runs([run]))
    return found


def test_increments_are_added_and_totals_are_not(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"restarts/resume": 1, "steps_skipped": 1, "samples_skipped/checksum": 2},
        {"restarts/resume": 1, "restarts/rollback": 1, "read_retries": 3, "steps_skipped": None},
        {"restarts/resume": 2, "restarts/rollback": 1, "samples_skipped/short_read": 1},
        {"checkpoint_failures": 1, "samples_skipped/checksum": 2, "read_retries": 0.0},
    ]
    assert faults(logged(tmp_path / "run", records)).told == (
        "continued from a checkpoint twice",
        "diverged and rolled back once",
        "left out 1 step whose gradient was not finite",
        "1 checkpoint could not be written",
        "left out 5 damaged training samples (4 checksum, 1 short_read)",
        "tried 3 reads again",
    )


def test_a_result_knows_of_restarts_that_no_step_was_logged_after(tmp_path: Path) -> None:
    run = logged(tmp_path / "run", [{"restarts/resume": 1}], restarts={"resume": 3, "rollback": 0})
    assert faults(run).told == ("continued from a checkpoint 3 times",)


def test_damaged_test_samples_and_ranks_that_differ_are_told(tmp_path: Path) -> None:
    metrics = {"test/accuracy": 0.5, "test/skipped": 2}
    run = logged(tmp_path / "run", [{"memory_rank_mismatches": 1.0}], metrics=metrics)
    assert faults(run).told == (
        "left out 2 damaged test samples",
        "memory or potentials of 1 rank differed",
    )


def test_a_slow_rank_is_told_with_its_worst_and_how_often(tmp_path: Path) -> None:
    ratios = [(1.0, 0), (1.5, 1), (1.6, 2), (3.0, 3)]
    records = [{"slowest_rank_ratio": ratio, "slowest_rank": rank} for ratio, rank in ratios]
    assert faults(logged(tmp_path / "run", records)).told == (
        "waited for a slow rank in 2 of 4 logged steps (at worst rank 3, 3.0 times the others)",
    )


def test_the_page_says_plainly_that_nothing_went_wrong(tmp_path: Path) -> None:
    clean = {"restarts/resume": 0.0, "read_retries": 0.0, "slowest_rank_ratio": 1.1}
    verdict = {"trust": 0.0, "agreement": None}
    runs = [
        logged(tmp_path / "done", [clean], guard=[verdict]),
        logged(tmp_path / "trusting", [clean], guard=[{"trust": 0.4, "agreement": None}]),
        logged(tmp_path / "running", [clean]),
    ]
    (runs[2] / "results.json").unlink()
    rows = Page(write_report(runs, tmp_path / "report.html")[0]).rows
    assert ["done", "nothing went wrong", "teacher left out"] in rows
    assert ["trusting", "nothing went wrong", "teacher trusted 40 %"] in rows
    assert ["running", "nothing went wrong so far", "\u2013"] in rows


def test_what_does_not_train_has_no_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "memory", stage="memory", method="")
    (run / "metrics.jsonl").unlink()
    assert read_faults(load_runs([run])) == []
