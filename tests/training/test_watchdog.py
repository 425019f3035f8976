from __future__ import annotations

from pathlib import Path

import pytest

from cmkd_scale.training.watchdog import Beat, Watchdog, report
from tests.conftest import REPOSITORY, Launch

SCRIPT = REPOSITORY / "tests" / "scripts" / "hangs.py"


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("processes", "hanging", "phase"),
    [(2, 1, "data"), (2, 0, "forward"), (3, 2, "data")],
)
def test_the_rank_that_hangs_is_named_by_all(
    tmp_path: Path, launch: Launch, processes: int, hanging: int, phase: str
) -> None:
    done = launch(SCRIPT, tmp_path, str(hanging), phase, processes=processes, check=False)
    assert done.returncode != 0
    found = f"Rank {hanging} has not moved"
    assert found in done.stderr, done.stderr
    assert f"it is at step 7, in phase '{phase}'" in done.stderr
    others = [rank for rank in range(processes) if rank != hanging]
    assert f"rank {', '.join(map(str, others))} waits for it" in done.stderr
    stacks = (tmp_path / f"hang_rank_{hanging}.txt").read_text()
    assert "in sleeping_rank" in stacks


def test_places_are_compared_by_step_then_phase() -> None:
    told = {
        0: Beat(7, "exchange", 30.0),
        1: Beat(7, "backward", 31.0),
        2: Beat(6, "checkpoint", 32.0),
    }
    text = report(0, told[0], told, 30.0)
    assert text.startswith("Rank 2 has not moved for 32 s: it is at step 6, in phase 'checkpoint'")
    assert "rank 0, 1 waits for it" in text


def test_where_all_stand_in_one_place_it_does_not_guess() -> None:
    told = {0: Beat(7, "backward", 30.0), 1: Beat(7, "backward", 31.0)}
    assert "Rank 0, 1 has not moved" in report(0, told[0], told, 30.0)
    assert "all stand there" in report(0, told[0], told, 30.0)


def test_without_word_from_the_others_it_speaks_for_itself() -> None:
    text = report(3, Beat(5, "data", 61.0), {}, 60.0)
    assert text.startswith("Rank 3 has not moved for 61 s: it is at step 5, in phase 'data'. After")
    assert "run.watchdog_seconds=60" in text


def test_a_rank_that_moves_is_left_alone(tmp_path: Path) -> None:
    with Watchdog(0.0, directory=tmp_path) as watchdog:
        watchdog.at("data", 1)
    with Watchdog(3600.0, directory=tmp_path) as watchdog:
        watchdog.at("data", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multirank
@pytest.mark.parametrize("stopped", [0, 2])
def test_a_rank_whose_machine_stops_is_reported_by_the_others(
    tmp_path: Path, launch: Launch, stopped: int
) -> None:
    words: list[str | Path] = [SCRIPT, tmp_path, str(stopped), "stopped"]
    done = launch(*words, processes=3, check=False)
    assert done.returncode != 0
    others = {rank for rank in range(3) if rank != stopped}
    found = {int(path.stem[-1]) for path in tmp_path.glob("hang_rank_*.txt")}
    assert found == others, done.stderr
    # Rank 0 keeps what ranks tell.
    named = "rank 0, which keeps what they tell" if stopped == 0 else "Rank 2 has not moved for"
    assert done.stderr.count(named) == 2


def test_a_rank_that_tells_nothing_more_hangs_as_long_as_others_wait_for_it() -> None:
    told = {0: Beat(7, "backward", 31.0), 1: Beat(5, "data", 0.2)}
    text = report(0, told[0], told, 30.0, 2)
    assert text.startswith("Rank 1 has not moved for 31 s: it is at step 5, in phase 'data'")
