"""How far and how fast runs are, against sums by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_progress import Speed, read_progress, read_speeds
from cmkd_scale.monitoring.report_runs import load_runs
from tests.monitoring.test_report_runs import NONE, Page, make_run

CONFIG = "run: {seed: 0}\nmethod: {name: kd_memory, control: none}\ntrain: {steps: 200}\n"


def logged(run: Path, records: Sequence[Mapping[str, Any]], *, done: bool = True) -> Path:
    make_run(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "config.yaml").write_text(CONFIG)
    (run / "env.json").write_text('{"world_size": 4}')
    if not done:
        (run / "results.json").unlink()
    return run


RECORDS: list[dict[str, Any]] = [
    {"step": 1, "step_seconds": 9.0, "samples_per_second": 1.0, "data_wait_seconds": 8.0},
    {"step": 10, "step_seconds": 0.1, "samples_per_second": 640.0, "data_wait_seconds": 0.3},
    {
        "step": 40,
        "step_seconds": 0.2,
        "samples_per_second": 320.0,
        "data_wait_seconds": 1.2,
        "checkpoint_stall_seconds": 0.69,
        "slowest_rank_ratio": 1.2,
        "eta_seconds": 32.0,
        "loss": 1.5,
    },
]


def speed(run: Path) -> Speed:
    [found] = read_speeds(load_runs([run]))
    return found


def test_speed_is_weighted_by_time_and_leaves_out_the_first_logged_step(tmp_path: Path) -> None:
    found = speed(logged(tmp_path / "run", RECORDS))
    seconds = 9 * 0.1 + 30 * 0.2
    assert found.step_seconds == pytest.approx(seconds / 39)
    assert found.samples_per_second == pytest.approx(39 * 64 / seconds)
    assert found.wait_share == pytest.approx(1.5 / seconds)
    assert found.stall_seconds == pytest.approx(0.69)
    assert found.stall_share == pytest.approx(0.69 / seconds)
    assert found.slowest_ratio == pytest.approx(1.2)


def test_a_single_logged_step_is_all_there_is(tmp_path: Path) -> None:
    found = speed(logged(tmp_path / "run", RECORDS[:1]))
    assert (found.step_seconds, found.samples_per_second) == (9.0, 1.0)
    assert (found.stall_seconds, found.slowest_ratio) == (0.0, None)


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": 1.0}],
        [{"step": 1, "step_seconds": None}, {"step": 2, "step_seconds": "fast"}],
        [{"step": 1, "step_seconds": 0.0}],
    ],
)
def test_without_durations_there_is_no_speed(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert read_speeds(load_runs([logged(tmp_path / "run", records)])) == []


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    runs = [
        logged(tmp_path / "done", RECORDS),
        logged(tmp_path / "going", RECORDS, done=False),
        logged(tmp_path / "unplanned", [{"step": 7}], done=False),
    ]
    (runs[2] / "config.yaml").unlink()
    going, unplanned = read_progress(load_runs(runs))
    assert (going.step, going.planned, going.share, going.eta_seconds) == (40, 200, 0.2, 32.0)
    assert (unplanned.step, unplanned.share, unplanned.eta_seconds) == (7, None, None)
    page = Page(write_report(runs, tmp_path / "report.html")[0])
    assert ["going", "kd_memory", "0", "40 of 200", "20 %", "32 s", "1.500"] in page.rows
    assert ["unplanned", "unknown", NONE, "7", NONE, NONE, NONE] in page.rows
    [row] = [row for row in page.rows if row[0] == "going" and len(row) == 7 and row[1] == "4"]
    assert row[2:] == ["362", "176.9", "21.7", "0.69 s (10.0 %)", "1.20 ×"]  # noqa: RUF001
