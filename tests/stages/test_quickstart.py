from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.config import Config, make_config, with_changes
from cmkd_scale.stages import quickstart as module
from cmkd_scale.stages.quickstart import quickstart, summarise, summary_table


def test_the_summary_is_of_the_seeds_in_order() -> None:
    rows = [("a", 1, 0.25), ("b", 0, 0.5), ("a", 0, 0.5), ("b", 1, 1.0)]
    summary = summarise(rows)
    accuracy = summary["a"]["test/accuracy"]
    assert accuracy["seeds"] == [0.5, 0.25]
    assert accuracy["mean"] == 0.375
    assert accuracy["std"] == pytest.approx(statistics.stdev([0.5, 0.25]))


@pytest.mark.slow
def test_the_whole_story_in_miniature(
    tmp_path: Path, fsdd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage on real data, with a few steps; what is learned is measured elsewhere."""
    monkeypatch.setenv("CMKD_CACHE", str(tmp_path / "cache"))
    counts = {"train_per_class": 3, "validation_per_class": 1, "test_per_class": 1}
    monkeypatch.setattr(module, "COUNTS", {"image": counts, "audio": counts})

    def short(tree: dict[str, Any]) -> Config:
        return with_changes(make_config(tree), {"train.steps": 3, "train.global_batch_size": 12})

    monkeypatch.setattr("cmkd_scale.stages.quickstart.make_config", short)
    results = quickstart(tmp_path / "out", seed=5, fsdd=fsdd)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == {**written, "report": str(tmp_path / "out" / "report.html")}
    assert list(written["summary"]) == ["ce_ls", "ucmkd_global", "ucmkd_global/permuted"]
    assert written["seeds"] == [5, 6, 7]
    assert len(written["runs"]) == 10
    for label, row in written["summary"].items():
        for seed, accuracy in zip(written["seeds"], row["test/accuracy"]["seeds"], strict=True):
            run = tmp_path / "out" / f"{label.replace('/', '-')}-seed{seed}"
            run_results = json.loads((run / "results.json").read_text())
            assert run_results["metrics"]["test/accuracy"] == accuracy
            assert run_results["method"] == label
    assert "ucmkd_global/permuted" in (tmp_path / "out" / "report.html").read_text()
    table = summary_table(results)
    assert "seed 6" in table
    # Started again, nothing is trained anew: the same figures come back.
    again = quickstart(tmp_path / "out", seed=5, fsdd=fsdd)
    assert again["summary"] == results["summary"]
