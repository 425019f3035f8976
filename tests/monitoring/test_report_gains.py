"""Gains of classes: pairs of seeds by hand, and what becomes of few and of many classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_gains import DRAWN, Gains, read_gains
from cmkd_scale.monitoring.report_runs import group_runs, load_runs
from cmkd_scale.monitoring.report_verdict import find_control
from tests.monitoring.test_report_runs import MINUS, Page, make_run


def evaluated(run: Path, method: str, seed: int, by_class: Mapping[str, float]) -> Path:
    accuracy = sum(by_class.values()) / max(1, len(by_class))
    metrics: dict[str, Any] = {"test/accuracy": accuracy, "test/per_class_accuracy": by_class}
    return make_run(run, method, seed, metrics=metrics)


def gains_of(*runs: Path) -> Gains | None:
    groups = group_runs(load_runs(runs))
    return read_gains(groups, find_control(groups))


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    found = gains_of(
        evaluated(tmp_path / "a0", "ce_ls", 0, {"cat": 0.5, "dog": 0.5, "owl": 0.1}),
        evaluated(tmp_path / "a1", "ce_ls", 1, {"cat": 0.1, "dog": 0.6}),
        evaluated(tmp_path / "a2", "ce_ls", 2, {"cat": 0.0, "dog": 0.0}),
        evaluated(tmp_path / "b0", "kd_memory", 0, {"cat": 0.4, "dog": 0.5}),
        evaluated(tmp_path / "b1", "kd_memory", 1, {"cat": 0.6, "dog": 0.4}),
        evaluated(tmp_path / "b3", "kd_memory", 3, {"cat": 1.0, "dog": 1.0}),
        evaluated(tmp_path / "c", "kd_memory/permuted", 0, {"cat": 1.0, "dog": 1.0}),
    )
    assert found is not None
    assert (found.method, found.control, found.seeds) == ("kd_memory", "ce_ls", (0, 1))
    # owl has no sample in the other runs' tests.
    assert [row.name for row in found.classes] == ["cat", "dog"]
    cat, dog = found.classes
    assert cat.by_seed == pytest.approx((-0.1, 0.5))
    assert (cat.gain, cat.with_teacher, cat.without) == pytest.approx((0.2, 0.5, 0.3))
    assert dog.gain == pytest.approx(-0.1)
    assert found.sentence == (
        "kd_memory against ce_ls, over 2 seeds: of 2 classes 1 gain, 1 lose and 0 stay as they "
        "were."
    )


def test_a_method_that_shares_no_seed_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    control = evaluated(tmp_path / "a", "ce_ls", 0, {"cat": 0.5})
    best = evaluated(tmp_path / "b", "kd_memory", 1, {"cat": 0.9})
    second = evaluated(tmp_path / "c", "coral", 0, {"cat": 0.6})
    assert gains_of(control, best) is None
    found = gains_of(control, best, second)
    assert found is not None
    assert found.method == "coral"


def test_without_a_control_or_classes_there_is_nothing(tmp_path: Path) -> None:
    alone = evaluated(tmp_path / "a", "kd_memory", 0, {"cat": 0.5})
    assert gains_of(alone) is None
    assert gains_of(alone, evaluated(tmp_path / "b", "ce_ls", 0, {})) is None


@pytest.mark.parametrize("classes", [1, DRAWN, DRAWN + 1])
def test_few_classes_are_drawn_and_many_listed_from_both_ends(tmp_path: Path, classes: int) -> None:
    names = [f"c{i:02}" for i in range(classes)]
    without = dict.fromkeys(names, 0.5)
    # The first gains nothing, odd ones gain, even ones lose, the later the more.
    taught = {n: 0.5 + i / 100 * (1 if i % 2 else -1) for i, n in enumerate(names)}
    runs = [
        evaluated(tmp_path / "a", "ce_ls", 0, without),
        evaluated(tmp_path / "b", "kd_memory", 0, taught),
    ]
    files = write_report(runs, tmp_path / "report.html")
    assert ("gains" in [file.stem for file in files[1:]]) == (classes <= DRAWN)
    page = Page(files[0])
    if classes <= DRAWN:
        assert set(names) <= set(page.labels)
        return
    listed = [row for row in page.rows if row and row[0] in names]
    best, worst = names[::-1][1::2][:8], names[::-1][0::2][:8]
    assert [row[0] for row in listed] == best + worst
    assert listed[0] == ["c29", "+29.0", "79.0", "50.0", "1 of 1"]
    assert listed[8] == ["c30", f"{MINUS}30.0", "20.0", "50.0", "0 of 1"]
