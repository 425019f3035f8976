"""Which keys of configurations differ, and what the runs that differ are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_compare import Differences, read_differences
from cmkd_scale.monitoring.report_runs import load_runs
from tests.monitoring.test_report_runs import NONE, Page, make_run


def configured(run: Path, method: str, seed: int = 0, **sections: Any) -> Path:
    make_run(run, method, seed)
    config = {"run": {"dir": str(run), "seed": seed}, "method": {"name": method}, **sections}
    (run / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return run


def differences(*runs: Path) -> Differences | None:
    return read_differences(load_runs(runs))


def test_runs_that_differ_in_method_and_seed_alone_are_the_same(tmp_path: Path) -> None:
    train = {"steps": 10}
    first = configured(tmp_path / "a", "ce_ls", 0, train=train)
    second = configured(tmp_path / "b", "coral", 1, train=train)
    assert differences(first) is None
    assert differences(first, second, make_run(tmp_path / "c")) is None


def test_only_keys_that_differ_are_shown_with_their_values(tmp_path: Path) -> None:
    data = {"options": {"n": 3}, "label_map": {}, "augment": True}
    found = differences(
        configured(tmp_path / "a", "ce_ls", data=data, train={"steps": 10, "rate": 0.1}),
        configured(tmp_path / "b", "coral", data=data, train={"steps": 20, "rate": 0.1}),
        configured(tmp_path / "c", "mmd", data={**data, "options": {}, "shards": None}),
    )
    assert found is not None
    assert [variant.name for variant in found.variants] == ["ce_ls", "coral", "mmd"]
    assert found.rows == (
        ("data.options", (NONE, NONE, "{}")),
        ("data.options.n", ("3", "3", NONE)),
        ("data.shards", (NONE, NONE, "unset")),
        ("train.rate", ("0.1", "0.1", NONE)),
        ("train.steps", ("10", "20", NONE)),
    )


def test_a_method_in_two_variants_is_told_apart_by_its_runs(tmp_path: Path) -> None:
    slow, fast = {"rate": 0.1}, {"rate": 0.2}
    runs = [configured(tmp_path / f"s{n}", "coral", n, train=slow) for n in range(5)]
    runs += [configured(tmp_path / "f", "coral", 0, train=fast)]
    runs += [configured(tmp_path / "c", "ce_ls", 0, train=fast)]
    found = differences(*runs)
    assert found is not None
    assert [variant.name for variant in found.variants] == [
        "coral (s0, s1, s2, and 2 more)",
        "coral (f), ce_ls",
    ]
    assert found.variants[0].runs == ("s0", "s1", "s2", "s3", "s4")
    page = Page(write_report(runs, tmp_path / "report.html")[0])
    assert sorted(page.row("train.rate")) == ["0.1", "0.2", "train.rate"]
