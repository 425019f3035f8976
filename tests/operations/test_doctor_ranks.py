from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from cmkd_scale.operations import doctor_ranks as ranks
from cmkd_scale.operations.doctor_findings import Finding, merged
from tests.conftest import REPOSITORY, Launch
from tests.stages.conftest import Story

SCRIPT = REPOSITORY / "tests" / "scripts" / "doctor.py"


def test_versions_that_differ_are_named_with_their_ranks() -> None:
    same = {"torch": "2.13.0", "configuration": "abc"}
    (fine,) = ranks.differing([same, same])
    assert (fine.severity, fine.found) == ("ok", "torch 2.13.0")
    (found,) = ranks.differing([same, same, {**same, "torch": "2.12.0"}])
    assert found.severity == "blocker"
    assert found.found == "Ranks differ in torch: 2.13.0 on rank 0, 2.12.0 on rank 2."


def test_clocks_that_differ() -> None:
    (fine,) = ranks.apart([100.0, 101.0])
    assert fine.severity == "ok"
    (found,) = ranks.apart([100.0, 130.0, 101.0])
    assert found.severity == "warning"
    assert "clock of rank 1 is 30 s ahead of that of rank 0" in found.found


def test_sums_that_are_wrong() -> None:
    assert ranks.summed([10.0, 10.0], 4) == []
    (found,) = ranks.summed([10.0, 9.5], 4)
    assert found.severity == "blocker"
    assert "9.5 instead of 10" in found.found


def test_one_rank_has_nothing_to_sum() -> None:
    assert ranks.collectives(torch.device("cpu")) == ([], None)


def test_a_directory_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (found,) = ranks.directory(tmp_path / "a" / "b")
    assert found.severity == "ok"
    assert list(tmp_path.iterdir()) == []


def test_findings_of_ranks_are_told_once() -> None:
    one, other = Finding("disk", "ok", "same"), Finding("disk", "warning", "full")
    assert merged([[one], [one, other, other]]) == [
        one,
        Finding("disk", "warning", "full", ranks=(1,)),
    ]


@pytest.mark.multirank
@pytest.mark.slow
def test_two_ranks(tmp_path: Path, launch: Launch) -> None:
    done = launch(SCRIPT, tmp_path, processes=2)
    assert done.stdout.count("all seen") == 2


@pytest.mark.multirank
@pytest.mark.slow
def test_the_verb_on_two_ranks(story: Story, tmp_path: Path, launch: Launch) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(story.tree(tmp_path / "run")))
    done = launch("doctor", "--config", file, processes=2)
    assert done.stdout.startswith("all well")
    assert done.stdout.strip().endswith("2 ranks")
