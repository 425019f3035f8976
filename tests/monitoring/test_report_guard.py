from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_guard import read_guards, run_trust
from cmkd_scale.monitoring.report_runs import group_runs, load_runs


def verdict(trust: float, z: float | None) -> dict[str, Any]:
    agreement = None if z is None else {"correlation": z / 50, "z": z, "p": 0.01, "classes": 9}
    return {"trust": trust, "agreement": agreement}


def make_run(run: Path, method: str, seed: int, guard: Any) -> Path:
    run.mkdir(parents=True)
    results = {
        "stage": "student",
        "method": method,
        "seed": seed,
        "metrics": {"test/accuracy": 0.5},
    }
    if guard is not None:
        results["guard"] = guard
    (run / "results.json").write_text(json.dumps(results))
    return run


def test_a_method_is_the_mean_over_runs_and_memories(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", "right", 0, [verdict(1.0, 10.0), verdict(0.5, 3.0)]),
        make_run(tmp_path / "b", "right", 1, [verdict(1.0, 11.0), verdict(0.0, None)]),
        make_run(tmp_path / "c", "plain", 0, []),
        make_run(tmp_path / "d", "old", 0, None),
        make_run(tmp_path / "e", "few", 0, [verdict(0.0, None)]),
    ]
    found = {row.method: row for row in read_guards(group_runs(load_runs(runs)))}
    assert set(found) == {"right", "few"}
    right = found["right"]
    assert right.runs == 2
    assert right.trust == pytest.approx(0.625)
    assert right.z == pytest.approx(8.0)
    assert right.correlation == pytest.approx(0.16)
    assert (found["few"].trust, found["few"].z) == (0.0, None)


def test_the_trust_of_a_run_is_the_mean_over_its_memories(tmp_path: Path) -> None:
    runs = load_runs(
        [
            make_run(tmp_path / "a", "two", 0, [verdict(1.0, 10.0), verdict(0.5, None)]),
            make_run(tmp_path / "b", "none", 0, []),
        ]
    )
    assert [run_trust(run) for run in runs] == [0.75, None]


def test_the_page_says_how_far_each_teacher_was_trusted(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", "right", 0, [verdict(1.0, 10.0)]),
        make_run(tmp_path / "b", "right/permuted", 0, [verdict(0.0, -0.5)]),
    ]
    page = tmp_path / "report.html"
    write_report(runs, page)
    section = page.read_text().split("How far the teacher was trusted")[1].split("</section>")[0]
    rows = [row.split("</tr>")[0] for row in section.split("<tr><td")[1:]]
    named = [re.findall(r">([^<]+)</span>", row) for row in rows]
    assert named == [["right"], ["right/permuted"]]
    assert "100.0" in rows[0]
    assert "10.0 sd" in rows[0]
    assert "\u22120.5 sd" in rows[1]


def test_without_guarded_runs_there_is_no_section(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_report([make_run(tmp_path / "a", "plain", 0, [])], page)
    assert "trusted" not in page.read_text()


BAD: list[Any] = ["no list", [3], [{"trust": 1.0}], [{"trust": "x", "agreement": None}]]


@pytest.mark.parametrize("bad", BAD)
def test_malformed_verdicts_are_refused_by_name(tmp_path: Path, bad: Any) -> None:
    run = make_run(tmp_path / "spoilt", "right", 0, bad)
    with pytest.raises(IntegrityError, match="spoilt"):
        read_guards(group_runs(load_runs([run])))
