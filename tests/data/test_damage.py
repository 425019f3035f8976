"""The budget for damaged samples: each counted once, over processes and continued runs."""

from __future__ import annotations

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
        quarantine.add(incident(place))
        distinct = set(places[:count])
        if len(distinct) > allowed:
            with pytest.raises(IntegrityError):
                quarantine.check()
        else:
            quarantine.check()
        assert len(quarantine) == len(distinct)
        assert quarantine.met == {"checksum": count}
        assert [one.place for one in seen] == list(dict.fromkeys(places[:count]))


def test_the_error_names_sample_count_budget_and_remedy() -> None:
    quarantine = Quarantine(1000, max_bad_fraction=0.001)
    quarantine.add(incident(1))
    quarantine.check()
    quarantine.add(incident(2))
    with pytest.raises(IntegrityError) as caught:
        quarantine.check()
    assert caught.value.exit_code == EXIT_INTEGRITY
    for part in ("key-2", "2 of 1000 samples", "max_bad_fraction=0.001 allows 1", "shards verify"):
        assert part in str(caught.value)


def test_without_a_budget_the_first_sample_ends_the_run_and_is_recorded() -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(1000, max_bad_fraction=0, record=seen.append)
    quarantine.add(incident(7))
    with pytest.raises(IntegrityError, match="allows 0"):
        quarantine.check()
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
    quarantine.check()
    quarantine.add(incident(4))
    with pytest.raises(IntegrityError, match="4 of 100"):
        quarantine.check()


def test_a_run_that_had_met_too_many_does_not_forget_it() -> None:
    with pytest.raises(IntegrityError, match="1 of 100"):
        Quarantine(100, max_bad_fraction=0, known=[1]).check()


class Names:
    """Stands in for a reader, whose shards would say the same."""

    def incident(self, place: int, error: DamagedError) -> Incident:
        return incident(place, error.reason)


def test_alone_there_is_nobody_to_share_with() -> None:
    seen: list[Incident] = []
    quarantine = Quarantine(100, max_bad_fraction=0.01, record=seen.append)
    quarantine.add(incident(1))
    quarantine.share(Names())
    quarantine.share(Names())
    assert seen == [incident(1)]
    quarantine.add(incident(2))
    with pytest.raises(IntegrityError, match=r"key-2.*2 of 100"):
        quarantine.share(Names())


@pytest.mark.parametrize("reason", REASONS)
def test_damage_is_an_integrity_error_with_a_reason(reason: str) -> None:
    error = DamagedError(reason, "It has changed.")
    assert isinstance(error, IntegrityError)
    assert (error.reason, str(error), error.exit_code) == (reason, "It has changed.", 42)
