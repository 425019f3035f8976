"""Which samples each step has read, for audits: ``order/rank_00000.jsonl``, a line a step.

On resume, lines of steps that no checkpoint holds are dropped from the files of all ranks, also
of those that the new world no longer has, so that each step stands there once.
"""

from __future__ import annotations

import json
from pathlib import Path

from cmkd_scale.monitoring.jsonl import cut_back

DIRECTORY = "order"


def cut_back_all(run: Path, step: int) -> None:
    """Drop all lines of ``step`` and later, of all ranks; on one rank, before any logs."""
    for path in (run / DIRECTORY).glob("rank_*.jsonl"):
        cut_back(path, step - 1)


class OrderLogFile:
    """Appends one JSON object a step: ``{"step": 7, "keys": [...]}``; steps count from 0."""

    def __init__(self, run: Path, rank: int) -> None:
        """Open the file of a rank."""
        path = run / DIRECTORY / f"rank_{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def log(self, step: int, keys: tuple[str, ...]) -> None:
        """Record what a step has read."""
        self._file.write(json.dumps({"step": step, "keys": keys}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
