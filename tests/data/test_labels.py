"""Label names of two streams compared, and renamed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmkd_scale.data.labels import LabelMap, compare_labels
from cmkd_scale.errors import UsageError

NAMES = [f"class {number}" for number in range(12)]
COUNTS = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 10**9), max_size=12)


@given(here=COUNTS, there=COUNTS)
def test_shift_is_that_of_scipy(here: dict[str, int], there: dict[str, int]) -> None:
    report = compare_labels("audio", here, "image", there)
    shared = [name for name in sorted(NAMES) if here.get(name) and there.get(name)]
    assert list(report.shared) == shared
    if not shared:
        return
    p = np.array([here[name] for name in shared]) / sum(here[name] for name in shared)
    q = np.array([there[name] for name in shared]) / sum(there[name] for name in shared)
    ratios = [max(a / b, b / a) for a, b in zip(p, q, strict=True)]
    assert report.kullback_leibler == pytest.approx(stats.entropy(p, q), abs=1e-12)
    assert report.total_variation == pytest.approx(math.fsum(abs(p - q)) / 2, abs=1e-12)
    assert report.largest_ratio == pytest.approx(max(ratios))


@given(here=COUNTS, there=COUNTS)
def test_report_is_bounded_and_tells_every_class_once(
    here: dict[str, int], there: dict[str, int]
) -> None:
    report = compare_labels("audio", here, "image", there)
    assert 0 <= report.total_variation <= 1
    assert report.kullback_leibler >= 0
    assert report.largest_ratio >= 1
    assert set(report.shared) | set(report.only_here) == {name for name in here if here[name]}
    assert set(report.shared) | set(report.only_there) == {name for name in there if there[name]}
    assert not set(report.only_here) & set(report.only_there)
    back = compare_labels("image", there, "audio", here)
    assert (back.only_here, back.only_there) == (report.only_there, report.only_here)
    assert back.total_variation == pytest.approx(report.total_variation)
    assert back.largest_ratio == pytest.approx(report.largest_ratio)


@given(counts=COUNTS.filter(lambda counts: any(counts.values())), times=st.integers(1, 1000))
def test_equal_shares_are_no_shift(counts: dict[str, int], times: int) -> None:
    more = {name: count * times for name, count in counts.items()}
    report = compare_labels("audio", counts, "image", more)
    assert (report.total_variation, report.kullback_leibler, report.largest_ratio) == (0, 0, 1)
    assert report.only_here == report.only_there == ()
    assert len(report.lines()) == 1


def test_disjoint_streams_share_nothing() -> None:
    report = compare_labels("audio", {"a": 3, "b": 0}, "image", {"b": 5, "a": 0, "c": 1})
    assert (report.shared, report.only_here, report.only_there) == ((), ("a",), ("b", "c"))
    assert (report.total_variation, report.kullback_leibler, report.largest_ratio) == (0, 0, 1)
    assert "0 of 1 classes" in report.lines()[0]


def test_streams_without_labels_are_compared() -> None:
    report = compare_labels("audio", {}, "image", {})
    assert (report.shared, report.only_here, report.only_there) == ((), (), ())


def test_lines_are_for_people() -> None:
    here = {"dog": 30, "cat": 10, **{f"only {number}": 1 for number in range(9)}}
    report = compare_labels("audio", here, "image", {"dog": 1, "cat": 1, "cow": 4})
    assert report.lines() == [
        "labels of audio and image: 2 of 11 classes are in both; label shift 0.250 (total "
        "variation), 0.131 nats, at most 2.0 times",
        "only in audio: only 0, only 1, only 2, only 3, only 4, only 5, only 6, only 7, ...",
        "only in image: cow",
    ]


def test_report_is_plain_values() -> None:
    report = compare_labels("audio", {"a": 3, "x": 1}, "image", {"a": 5})
    again = json.loads(json.dumps(report.to_json()))
    assert again["shared"] == ["a"]
    assert again["only_here"] == ["x"]
    assert again["kullback_leibler"] == 0


# ------------------------------------------------------------------------------- label maps


def test_without_renaming_a_map_changes_nothing() -> None:
    assert LabelMap.make(["b", "a"], {}) == LabelMap(("b", "a"), (0, 1))


def test_classes_are_renamed_and_merged() -> None:
    found = LabelMap.make(
        ["dog", "cat", "puppy", "cow"], {"puppy": "dog", "dog": "dog", "cow": "bull"}
    )
    assert found == LabelMap(("dog", "cat", "bull"), (0, 1, 0, 2))
    assert found.counts([1, 2, 4, 8]) == {"dog": 5, "cat": 2, "bull": 8}


def test_names_may_be_exchanged() -> None:
    assert LabelMap.make(["a", "b"], {"a": "b", "b": "a"}) == LabelMap(("b", "a"), (0, 1))


@given(
    stored=st.lists(st.sampled_from(NAMES), unique=True, max_size=12),
    counts=st.lists(st.integers(0, 10**6), min_size=12, max_size=12),
    data=st.data(),
)
def test_every_sample_keeps_the_class_that_its_name_became(
    stored: list[str], counts: list[int], data: st.DataObject
) -> None:
    known = st.sampled_from(stored) if stored else st.nothing()
    renamed = data.draw(st.dictionaries(known, st.sampled_from([*NAMES, "new"])))
    found = LabelMap.make(stored, renamed)
    assert len(set(found.names)) == len(found.names)
    assert [found.names[place] for place in found.index] == [renamed.get(n, n) for n in stored]
    assert set(found.index) == set(range(len(found.names)))
    counts = counts[: len(stored)]
    assert sum(found.counts(counts).values()) == sum(counts)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.label_map.*'dgo'.*did you mean 'dog'"):
        LabelMap.make(["dog", "cat"], {"dgo": "wolf"})
