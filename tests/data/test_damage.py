"""The budget for damaged samples: each counted once, over processes and continued runs."""

from __future__ import annotations

import json
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmkd_scale.data.damage import REASONS, DamagedError, Incident, Quarantine
from cmkd_scale.errors import EXIT_INTEGRITY, IntegrityError


def incident(place: int, reason: str = "checksum") -> Incident:
    return Incident(
        place=place,
        reason=reason,
        shard="shard-000000.tar",
        key=f"key-{place}",
        message=f"Sample key-{place} has changed.",
    )


@given(samples=st.integers(0, 10**9), percent=st.integers(0, 100))
@example(samples=100, percent=29)  # 28.999... in binary
def test_a_budget_is_what_the_fraction_says_rounded_down(samples: int, percent: int) -> None:
    found = Quarantine(samples, max_bad_fraction=percent / 100).allowed
    assert found == samples * percent // 100


@given(places=st.lists(st.integers(0, 30), max_size=60), allowed=st.integers(0, 40))
def test_the_run_ends_at_the_first_distinct_sample_too_many(
    places: list[int], allowed: int
) -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(100, max_bad_fraction=allowed / 100, record=seen.append)
    for count, place in enumerate(places, start=1):
        before = set(places[: count - 1])
        if place not in before and len(before) == allowed:
            with pytest.raises(IntegrityError):
                quarantine.add(incident(place))
            return
        quarantine.add(incident(place))
        assert len(quarantine) == len(set(places[:count]))
        assert quarantine.met == {"checksum": count}
        assert [one.place for one in seen] == list(dict.fromkeys(places[:count]))


def test_the_error_names_sample_count_budget_and_remedy() -> None:
    quarantine = Quarantine(1000, max_bad_fraction=0.001)
    quarantine.add(incident(1))
    with pytest.raises(IntegrityError) as caught:
        quarantine.add(incident(2))
    assert caught.value.exit_code == EXIT_INTEGRITY
    for part in ("key-2", "2 of 1000 samples", "max_bad_fraction=0.001 allows 1", "shards verify"):
        assert part in str(caught.value)


def test_without_a_budget_the_first_sample_ends_the_run_and_is_recorded() -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(1000, max_bad_fraction=0, record=seen.append)
    with pytest.raises(IntegrityError, match="allows 0"):
        quarantine.add(incident(7))
    assert seen == [incident(7)]


def test_samples_are_counted_by_reason_each_time_they_are_left_out() -> None:
    quarantine = Quarantine(100, max_bad_fraction=0.1)
    for place, reason in ((1, "checksum"), (2, "undecodable"), (1, "checksum")):
        quarantine.add(incident(place, reason))
    assert quarantine.met == {"checksum": 2, "undecodable": 1}
    assert len(quarantine) == 2


def test_each_sample_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(100, max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        for place in (4, 4, 5):
            quarantine.add(incident(place))
    assert [record.getMessage() for record in caplog.records] == [
        "left out: Sample key-4 has changed.",
        "left out: Sample key-5 has changed.",
    ]


def test_what_an_earlier_part_of_the_run_recorded_counts_and_is_not_recorded_again() -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(100, max_bad_fraction=0.03, record=seen.append, known=[1, 2, 2])
    assert len(quarantine) == 2
    quarantine.add(incident(2))
    quarantine.add(incident(3))
    assert seen == [incident(3)]
    with pytest.raises(IntegrityError, match="4 of 100"):
        quarantine.add(incident(4))


def test_what_other_processes_met_is_taken_in_once() -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(100, max_bad_fraction=0.03, record=seen.append)
    quarantine.add(incident(1))
    quarantine.merge([incident(1), incident(2), incident(2)])
    quarantine.merge([incident(2)])
    assert [one.place for one in seen] == [1, 2]
    assert quarantine.met == {"checksum": 1}  # this process left out one
    with pytest.raises(IntegrityError, match="key-4"):
        quarantine.merge([incident(3), incident(4)])


def test_an_incident_is_one_line_of_json() -> None:
    line = incident(3, "undecodable").to_json()
    assert "\n" not in line
    assert json.loads(line) == {
        "shard": "shard-000000.tar",
        "key": "key-3",
        "reason": "undecodable",
        "place": 3,
        "message": "Sample key-3 has changed.",
    }


@pytest.mark.parametrize("reason", REASONS)
def test_damage_is_an_integrity_error_with_a_reason(reason: str) -> None:
    error = DamagedError(reason, "It has changed.")
    assert isinstance(error, IntegrityError)
    assert (error.reason, str(error), error.exit_code) == (reason, "It has changed.", 42)
