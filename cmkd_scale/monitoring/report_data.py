"""The report's section on data: samples, classes, and how classes are shared out in each stream.

Training's counts are in ``labels.json``, a memory's in the memory, the test's in the
predictions. Streams and comparisons that several methods have in common are shown once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report_analysis import read_predictions, read_prototypes
from cmkd_scale.monitoring.report_runs import Group, Run, read_object

_NAMES_SHOWN = 8

Counts = Mapping[str, int]
"""Samples by class."""


@dataclass(frozen=True)
class Stream:
    """Samples that runs read: to train on, in a memory, or to be tested on."""

    what: str
    users: tuple[str, ...]
    """Methods."""
    samples: int | None
    classes: int | None
    per_class: str
    """Samples a class, in words."""
    shift: float | None
    """Total variation of its class shares from those of the test, 0 to 1."""


@dataclass(frozen=True)
class Labels:
    """What the labels of a student and its memories have in common: ``labels.json``."""

    users: tuple[str, ...]
    here: str
    there: str
    shared: int
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    total_variation: float
    kullback_leibler: float
    largest_ratio: float

    @property
    def strangers(self) -> list[tuple[str, str]]:
        """For each stream with classes of its own: its name, and the first of them."""
        return [
            (
                stream,
                ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else ""),
            )
            for stream, names in ((self.here, self.only_here), (self.there, self.only_there))
            if names
        ]


_Shared = TypeVar("_Shared", Stream, Labels)


def read_streams(groups: Sequence[Group]) -> list[Stream]:
    """The streams of all methods: of each, those of its first run that has them.

    Raises:
        IntegrityError: a file of a run is malformed.
    """
    taught = any(group.is_student for group in groups)
    # The run that built a memory says no more of it than those that learn from it.
    shown = [group for group in groups if group.runs[0].stage != "memory" or not taught]
    return _together(stream for group in shown for stream in _streams(group))


def read_labels(groups: Sequence[Group]) -> list[Labels]:
    """The comparisons of all methods that learn from a memory, of the first run of each.

    Raises:
        IntegrityError: a ``labels.json`` is malformed.
    """
    found = []
    for group in groups:
        rows = (row for run in group.runs if (row := _labels(run, group.method)) is not None)
        found += [row for row in [next(rows, None)] if row is not None]
    return _together(found)


def _streams(group: Group) -> Iterator[Stream]:
    tested = next((counts for run in group.runs if (counts := _test_counts(run))), None)
    for run in group.runs:
        if (training := _training(run, group.method, tested)) is not None:
            yield training
            break
    for run in group.runs:
        if run.memory_files:
            for file in run.memory_files:
                memory = read_prototypes(file)
                counts = dict(zip(memory.class_names, memory.class_count.tolist(), strict=True))
                # A run of `cmkd memory` is often just called that.
                name = " ".join(dict.fromkeys(["memory", file.parent.name]))
                yield _stream(name, group.method, counts, tested)
            break
    if tested:
        yield _stream("test", group.method, tested, None)


def _test_counts(run: Run) -> Counts | None:
    predictions = read_predictions(run.path / "predictions.safetensors")
    if predictions is None:
        return None
    names = predictions.label_names
    counts = dict.fromkeys(names, 0)
    for label in predictions.labels.tolist():
        counts[names[label]] += 1
    return counts


def _training(run: Run, method: str, tested: Counts | None) -> Stream | None:
    """What a run trains on, as far as it has noted it."""
    labels = read_object(run.path / "labels.json")
    counts = labels.get("counts_here")
    if counts is not None:
        if not isinstance(counts, dict) or not all(type(n) is int for n in counts.values()):
            raise _malformed(run, "counts_here is no table of whole numbers")
        return _stream("training", method, counts, tested)
    per_class = run.setting("data", "n_per_class")
    if not isinstance(per_class, int):
        return None
    words = f"at most {per_class}"
    return Stream("training", (method,), None, None, words, None)


def _stream(what: str, method: str, counts: Counts, tested: Counts | None) -> Stream:
    filled = sorted(count for count in counts.values() if count > 0)
    if not filled:
        words = "none"
    elif filled[0] == filled[-1]:
        words = f"{filled[0]:,}"
    else:
        words = f"{filled[0]:,} to {filled[-1]:,}, median {statistics.median_low(filled):,}"
    shift = None if tested is None else _total_variation(counts, tested)
    return Stream(what, (method,), sum(filled), len(filled), words, shift)


def _total_variation(one: Counts, other: Counts) -> float:
    """Half the sum of the differences of class shares; a class that is missing has none."""
    total_one, total_other = max(1, sum(one.values())), max(1, sum(other.values()))
    return (
        sum(
            abs(one.get(name, 0) / total_one - other.get(name, 0) / total_other)
            for name in one.keys() | other.keys()
        )
        / 2
    )


def _labels(run: Run, method: str) -> Labels | None:
    value = read_object(run.path / "labels.json")
    if not value:
        return None
    try:
        return Labels(
            users=(method,),
            here=str(value["here"]),
            there=str(value["there"]),
            shared=len(_names(value["shared"])),
            only_here=_names(value["only_here"]),
            only_there=_names(value["only_there"]),
            total_variation=float(value["total_variation"]),
            kullback_leibler=float(value["kullback_leibler"]),
            largest_ratio=float(value["largest_ratio"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(run, repr(error)) from None


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("the names of classes are no list of texts")
    return tuple(value)


def _malformed(run: Run, why: str) -> IntegrityError:
    return IntegrityError(
        f"{run.path / 'labels.json'} is malformed ({why}); remove it, the report does without."
    )


def _together(rows: Iterator[_Shared] | Sequence[_Shared]) -> list[_Shared]:
    """Rows that differ in nothing but their users become one."""
    found: dict[_Shared, list[str]] = {}
    for row in rows:
        found.setdefault(replace(row, users=()), []).extend(row.users)
    return [replace(row, users=tuple(dict.fromkeys(users))) for row, users in found.items()]
