"""The report's table of what differs between the configurations of runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmkd_scale.monitoring.report_runs import Run

_OWN = ("run.dir", "run.seed", "method.name", "method.control")
"""Keys in which runs differ anyway; the page says them elsewhere."""
_RUNS_NAMED = 3


@dataclass(frozen=True)
class Variant:
    """Runs whose configurations are the same but for ``_OWN``."""

    name: str
    """Its methods; of those that are in several variants, the runs."""
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """The keys that differ, and what they are in each variant."""

    variants: tuple[Variant, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """Of each key, its value in each variant."""


def read_differences(runs: Sequence[Run]) -> Differences | None:
    """Compare the runs that have a configuration; None where all are the same."""
    by_content: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        if run.settings:
            values = {k: v for k, v in _flat(run.settings) if k not in _OWN}
            by_content.setdefault(tuple(sorted(values.items())), []).append(run)
    contents = [dict(content) for content in by_content]
    keys = tuple(
        key
        for key in sorted({key for content in contents for key in content})
        if len({content.get(key) for content in contents}) > 1
    )
    if not keys:
        return None
    labels = [{run.label for run in same} for same in by_content.values()]
    often = Counter(label for of_variant in labels for label in of_variant)
    variants = tuple(
        Variant(_name(same, often), tuple(run.name for run in same)) for same in by_content.values()
    )
    rows = tuple((key, tuple(content.get(key, "\u2013") for content in contents)) for key in keys)
    return Differences(variants, rows)


def _name(runs: Sequence[Run], often: Mapping[str, int]) -> str:
    """What to call a variant of these runs; ``often``: in how many variants each method is."""
    words = []
    for label in dict.fromkeys(run.label for run in runs):
        names = [run.name for run in runs if run.label == label]
        more = f", and {len(names) - _RUNS_NAMED} more" if len(names) > _RUNS_NAMED else ""
        named = f" ({', '.join(names[:_RUNS_NAMED])}{more})" if often[label] > 1 else ""
        words.append(f"{label}{named}")
    return ", ".join(words)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key with its section, and its value as it would stand in the file."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
