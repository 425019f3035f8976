from __future__ import annotations

import logging

import pytest

from cmkd_scale.training.rank_times import RankTimes


def test_the_slowest_is_compared_with_the_others() -> None:
    times = RankTimes()
    assert times.judge([1.0, 4.0, 2.0, 2.0]) == {"slowest_rank": 1, "slowest_rank_ratio": 2.0}
    # Of two, the median of both would hide half of the difference.
    assert times.judge([1.0, 3.0]) == {"slowest_rank": 1, "slowest_rank_ratio": 3.0}
    assert times.judge([2.0, 2.0]) == {"slowest_rank": 0, "slowest_rank_ratio": 1.0}


def test_one_rank_has_nobody_to_wait_for() -> None:
    times = RankTimes()
    times.add(1.0)
    assert times.share() == {}


def test_a_rank_that_stays_slow_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    times = RankTimes()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            times.judge([1.0, 2.0, 1.0])
        assert not caplog.records
        for _ in range(5):
            times.judge([1.0, 2.0, 1.0])
        assert [record.message[:30] for record in caplog.records] == [
            "Rank 1 takes 2.0 times as long"
        ]
        times.judge([1.0, 1.1, 1.0])  # it recovers, and is named again if it falls behind
        for _ in range(3):
            times.judge([1.0, 2.0, 1.0])
        assert len(caplog.records) == 2


def test_two_slow_ranks_are_both_named(caplog: pytest.LogCaptureFixture) -> None:
    times = RankTimes()
    for turn in range(4):
        times.judge([1.0, 2.0 + turn % 2, 1.0, 1.0, 3.0 - turn % 2])  # by turns the slowest
    assert sorted(record.message[:6] for record in caplog.records) == ["Rank 1", "Rank 4"]


def test_ranks_that_take_turns_are_not_slow(caplog: pytest.LogCaptureFixture) -> None:
    times = RankTimes()
    for turn in range(12):
        times.judge([2.0 if rank == turn % 3 else 1.0 for rank in range(3)])
    assert not caplog.records
