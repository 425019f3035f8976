"""What ``cmkd doctor`` finds: one finding, and the book that all ranks write into."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from cmkd_scale import distributed
from cmkd_scale.errors import EXIT_DONE, EXIT_INTEGRITY, EXIT_USAGE, CmkdError

Severity = Literal["ok", "note", "warning", "blocker"]
"""``warning``: it will cost something; ``blocker``: the run would fail, or train something else."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """Which of the checks, in a word or two."""
    severity: Severity
    found: str
    remedy: str = ""
    """Empty where there is nothing to do, or where ``found`` says it."""
    integrity: bool = False
    """Whether data, a memory or a checkpoint is not what its digest says."""
    ranks: tuple[int, ...] = ()
    """Which have found it; empty: all."""


class Book:
    """Findings of all ranks, in the order of the checks."""

    def __init__(self) -> None:
        """Empty."""
        self.findings: list[Finding] = []

    @property
    def blocked(self) -> bool:
        """Whether a blocker was found; the same on all ranks."""
        return any(finding.severity == "blocker" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """Of the program: 2 with a blocker, 42 if one is of integrity."""
        blockers = [finding for finding in self.findings if finding.severity == "blocker"]
        if any(finding.integrity for finding in blockers):
            return EXIT_INTEGRITY
        return EXIT_USAGE if blockers else EXIT_DONE

    def add(self, found: Iterable[Finding]) -> None:
        """Take in what this rank has found, and what the others have; a collective call."""
        self.findings += merged(_from_all_ranks(list(found)))


def merged(by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings of each rank, equal ones together, in the order in which they come first."""
    who: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in dict.fromkeys(findings):
            who.setdefault(finding, []).append(rank)
    return [
        replace(finding, ranks=() if len(ranks) == len(by_rank) else tuple(ranks))
        for finding, ranks in who.items()
    ]


def _from_all_ranks(mine: list[Finding]) -> list[list[Finding]]:
    texts = distributed.gather_texts(json.dumps([asdict(finding) for finding in mine]))
    return [[_finding(value) for value in json.loads(text)] for text in texts]


def _finding(value: dict[str, Any]) -> Finding:
    return Finding(**{**value, "ranks": tuple(value["ranks"])})


def attempt(check: str, work: Callable[[], _Value]) -> tuple[_Value | None, list[Finding]]:
    """The value of ``work``, or the error that a user can cause as a blocker."""
    try:
        return work(), []
    except CmkdError as error:
        return None, [blocker_of(check, error)]


def blocker_of(check: str, error: CmkdError) -> Finding:
    """What an error says, which names its remedy, too."""
    return Finding(check, "blocker", str(error), integrity=error.exit_code == EXIT_INTEGRITY)
