"""``metrics.jsonl``: one JSON object a logged step; written, cut back on resume, read.

A process can die in the middle of a line, and it can die after logging steps that no
checkpoint holds. Both are mended when the run continues: a torn last line and the lines
beyond the checkpoint are dropped, so that every step stands in the file once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cmkd_scale.errors import IntegrityError


class JsonlSink:
    """Appends one JSON object a line, ``step`` first, and flushes it.

    Args:
        path: the file, made if missing.
        resume_step: the step of the checkpoint that the run continues from; lines beyond
            it are dropped. None keeps every whole line. The file is replaced atomically.

    Raises:
        IntegrityError: a line other than the last is not a JSON object with a step.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_back(path, math.inf if resume_step is None else resume_step)
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; a number that is not finite becomes null, as JSON demands."""
        record: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            number = float(value)
            record[name] = number if math.isfinite(number) else None
        record["step"] = step
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_back(path: Path, last_step: float) -> None:
    """Drop the lines of later steps, and a torn last one; the file is replaced atomically.

    Raises:
        IntegrityError: a line other than the last is not a JSON object with a step.
    """
    _replace(path, (line for line, record in _lines(path) if record["step"] <= last_step))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the logged steps of a ``metrics.jsonl`` in file order, less a torn last line.

    Raises:
        IntegrityError: a line other than the last is not a JSON object with a step.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each whole line, ended by a newline, with what it holds."""
    with path.open("rb") as file:
        broken = 0
        for number, line in enumerate(file, start=1):
            if broken:
                raise IntegrityError(
                    f"{path} line {broken} is not a JSON object with a step, and lines follow "
                    "it, so no interrupted write explains it. Repair or delete that line, or "
                    "move the file away, and run the command again."
                )
            try:
                record = json.loads(line)
                whole = isinstance(record, dict) and type(record["step"]) is int
            except (ValueError, KeyError, RecursionError):
                whole = False
            if whole:
                yield line.rstrip(b"\r\n") + b"\n", record
            else:
                broken = number


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Replace ``path`` by ``lines``; a crash leaves either the old or the new file."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
