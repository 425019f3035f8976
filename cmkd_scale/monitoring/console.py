"""A run on the console: a progress bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_PLAIN_LINES = 20
_LONG_SECONDS = 10.0


class ConsoleSink:
    """Progress for a person; without a terminal about twenty lines a run.

    Args:
        total_steps: steps of the whole run.
        title: what is running, for example the stage; shown first.
        resume_step: the step that the run continues from.
        console: where to write; standard error if None, so that stdout stays for ``--json``.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        resume_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self._total = total_steps
        self._prefix = f"{title} " if title else ""
        self._stride = max(1, math.ceil(total_steps / _PLAIN_LINES))
        self._next_line = resume_step
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[summary]}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task(
                title, total=total_steps, completed=resume_step, summary=""
            )
            self._progress.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the step; without a terminal only the first and one in each twentieth part."""
        summary = _summary(values)
        if not summary:
            return  # for example the line of a checkpoint
        if self._progress is not None:
            self._progress.update(self._task, completed=step, summary=summary)
        elif step >= self._next_line or step == self._total:
            self._next_line = (step // self._stride + 1) * self._stride
            line = f"{self._prefix}step {step}/{self._total} {summary}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def counting(title: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Progress of work that is counted: a callback taking (done, total).

    A bar on a terminal; elsewhere one line when the work is done, and if it takes long, one
    for each tenth. To standard error unless ``console`` is given.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    totals, tenths, begun = [0], [0], time.monotonic()
    before: list[int] = []

    def count(done: int, total: int) -> None:
        totals[0] = total
        if not before:
            before.append(done)  # by an earlier part of the work
        tenth, seconds = 10 * done // max(1, total), time.monotonic() - begun
        if tenths[0] < tenth < 10 and seconds > _LONG_SECONDS:
            tenths[0] = tenth
            eta = duration(seconds * (total - done) / max(1, done - before[0]))
            line = f"{title}: {done:,} of {total:,}, ETA {eta}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield count
    console.print(f"{title}: {totals[0]:,}", markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in ``1:02:03``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _summary(values: Mapping[str, float]) -> str:
    """Return what follows the step on a console line; empty if nothing is to be shown."""
    parts: list[str] = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4g}")
    if "learning_rate" in values:
        parts.append(f"lr {values['learning_rate']:.2g}")
    if "samples_per_second" in values:
        parts.append(f"{values['samples_per_second']:,.0f} samples/s")
    if math.isfinite(eta := values.get("eta_seconds", math.nan)):
        parts.append(f"ETA {duration(eta)}")
    if "test/accuracy" in values:
        parts.append(f"test accuracy {values['test/accuracy']:.1%}")
    return "  ".join(parts)
