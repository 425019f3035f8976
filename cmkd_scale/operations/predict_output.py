"""What ``cmkd predict`` prints: a table on a terminal, a line a file elsewhere, or JSON.

Names, labels and errors come from strangers: none of them ends a line or moves the cursor.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cmkd_scale.errors import EXIT_DONE, EXIT_INTEGRITY, IntegrityError, UsageError
from cmkd_scale.monitoring.console_words import escaped
from cmkd_scale.operations.predict import Outcome, Prediction, Predictor
from cmkd_scale.operations.predict_files import Failure, Source, names_in

_WIDEST_LABEL = 24  # columns
_NARROWEST_NAME = 16


def run(
    directory: Path,
    files: Sequence[str],
    texts: Sequence[str],
    *,
    form: str,
    top_k: int,
    batch_size: int,
    workers: int,
    device: str | None,
    backend: str,
) -> None:
    """Predict and print; failures go to standard error, too, a line each.

    Args:
        directory: see ``predict``, as for what is not explained here.
        files: ``-`` stands for the names on standard input.
        texts: come after the files.
        form: ``json``, ``jsonl`` or ``text``.

    Raises:
        UsageError: some file, but none that was read, could not be predicted.
        IntegrityError: some file that was read could not.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the letters of a terminal
    if not files and not texts:
        raise UsageError("There is nothing to predict: name files, or - to read their names.")
    if workers < 0:
        raise UsageError(f"--workers is {workers}; it must be 0 or more.")
    predictor = Predictor(directory, device=device, backend=backend)
    codes: Counter[int] = Counter()
    outcomes = _note(
        predictor.outcomes(
            predictor.sources(_names(files), texts),
            top_k=top_k,
            batch_size=batch_size,
            workers=workers,
        ),
        codes,
    )
    try:
        _print(directory, predictor, outcomes, form, batch_size)
    except BrokenPipeError:  # whoever reads has enough, as `head` does; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    failed = codes.total() - codes[EXIT_DONE]
    if failed:
        kind = IntegrityError if codes[EXIT_INTEGRITY] else UsageError
        raise kind(f"{failed} of {codes.total()} could not be predicted, see above.")


def _print(
    directory: Path, predictor: Predictor, outcomes: Iterable[Outcome], form: str, batch_size: int
) -> None:
    if form == "jsonl":
        for outcome in outcomes:
            print(json.dumps(to_json(outcome)), flush=True)
    elif form == "json":
        print(json.dumps(_whole(directory, predictor, outcomes)))
    else:
        predictions = (row for row in outcomes if isinstance(row, Prediction))
        show(predictions, Console(), predictor.label_names, batch_size)
    sys.stdout.flush()


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Plain values; the key is ``file`` or ``text``."""
    named: dict[str, Any] = {outcome.source.kind: _valid(outcome.source.name)}
    if isinstance(outcome, Failure):
        return {**named, "error": outcome.error}
    return {
        **named,
        "label": outcome.label,
        "probability": outcome.probability,
        "top": [{"label": label, "probability": part} for label, part in outcome.top],
    }


def show(
    predictions: Iterable[Prediction],
    console: Console,
    label_names: Sequence[str],
    rows_at_a_time: int,
) -> None:
    """A table on a terminal, drawn as its rows come; elsewhere a line each."""
    if not console.is_terminal:
        for row in predictions:
            print(f"{escaped(row.source.name)}: {_ranks(row.top)}")
        return
    left, header = iter(predictions), True
    while rows := [*islice(left, rows_at_a_time)]:
        widths = _widths(console.width, label_names, alone=len(rows[0].top) == 1)
        console.print(_table(rows, widths, header=header))
        header = False


def _names(files: Iterable[str]) -> Iterator[str]:
    parts = (names_in(sys.stdin.buffer) if name == "-" else (name,) for name in files)
    return chain.from_iterable(parts)


def _note(outcomes: Iterable[Outcome], codes: Counter[int]) -> Iterator[Outcome]:
    """Count them by exit code on their way, and say which have failed."""
    for outcome in outcomes:
        codes[outcome.exit_code if isinstance(outcome, Failure) else EXIT_DONE] += 1
        if isinstance(outcome, Failure):
            print(escaped(f"{outcome.source.name}: {outcome.error}"), file=sys.stderr)
        yield outcome


def _whole(directory: Path, predictor: Predictor, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    rows = list(outcomes)
    return {
        "model": _valid(str(directory)),
        "modality": predictor.modality_name,
        "predictions": [to_json(row) for row in rows if isinstance(row, Prediction)],
        "failed": [to_json(row) for row in rows if isinstance(row, Failure)],
    }


def _valid(name: str) -> str:
    """What any reader of JSON takes: bytes that are not UTF-8 as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _ranks(top: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{escaped(label)} {_percent(share)}" for label, share in top)


def _fitting(top: Sequence[tuple[str, float]], columns: int) -> str:
    """As many of them as there is room for; of the first, as much."""
    fit = next((n for n in range(len(top), 1, -1) if cell_len(_ranks(top[:n])) <= columns), 1)
    return _head(_ranks(top[:fit]), columns)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _widths(columns: int, label_names: Sequence[str], *, alone: bool) -> tuple[int, int, int]:
    """Of name, label and the labels behind it; the share has 6 columns, and gaps have 2."""
    widest = max((cell_len(escaped(name)) for name in label_names), default=0)
    label = min(max(widest, len("label")), _WIDEST_LABEL)
    free = max(columns - label - 6 - (2 if alone else 3) * 2, _NARROWEST_NAME)
    name = free if alone else max(free // 2, _NARROWEST_NAME)
    return name, label, max(free - name, 0)


def _table(rows: Sequence[Prediction], widths: tuple[int, int, int], *, header: bool) -> Table:
    name, label, others = widths
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header)
    table.add_column("file", width=name, no_wrap=True)
    table.add_column("label", width=label, no_wrap=True)
    table.add_column("prob.", width=6, justify="right", no_wrap=True)
    if others:
        table.add_column("then", width=others, no_wrap=True, style="dim")
    for row in rows:
        cells = [
            Text(_short(escaped(row.source.name), name, row.source)),
            Text(_head(escaped(row.label), label), style="bold"),
            Text(_percent(row.probability)),
        ]
        if others:
            cells.append(Text(_fitting(row.top[1:], others)))
        table.add_row(*cells)
    return table


def _short(name: str, columns: int, source: Source) -> str:
    """A text from its beginning; of a path, the end, from a directory on if that fits."""
    if source.kind == "text" or cell_len(name) <= columns:
        return _head(name, columns)
    tail = name
    while cell_len(tail) > columns - 2 and "/" in tail:
        tail = tail.partition("/")[2]
    if cell_len(tail) <= columns - 2:
        return f"…/{tail}"
    while cell_len(tail) > columns - 1:
        tail = tail[1:]
    return f"…{tail}"


def _head(text: str, columns: int) -> str:
    if cell_len(text) <= columns:
        return text
    return set_cell_size(text, columns - 1).rstrip() + "…"
