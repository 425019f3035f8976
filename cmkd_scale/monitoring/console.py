"""A run on the console: a live screen on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from cmkd_scale.monitoring.console_footer import Footer, terminal_size
from cmkd_scale.monitoring.console_screen import Place, screen, summary
from cmkd_scale.monitoring.console_state import RunState
from cmkd_scale.monitoring.console_words import duration

_PLAIN_LINES = 20
_LONG_SECONDS = 10.0
_REFRESH_SECONDS = 0.5  # a drawing costs some 2 ms of the interpreter's time


class ConsoleSink:
    """Progress for a person; without a terminal about twenty lines a run.

    On a terminal a thread of its own draws at the bottom, and the loop only leaves numbers; logs
    and other output scroll above. A run that ends well leaves one line, another one the screen as
    it stood. What ends the process past ``atexit`` (``os._exit``) calls ``close`` before.

    Args:
        total_steps: steps of the whole run.
        title: what is running, for example the stage; shown first.
        resume_step: the step that the run continues from.
        console: where to write; standard error if None, so that stdout stays for ``--json``.
        run: which run it is, in words: its directory.
        place: where this process stands; asked for by another thread.
        clock: seconds.
        refresh_seconds: between two looks at the screen; 0: only ``draw`` draws.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        resume_step: int = 0,
        console: Console | None = None,
        run: str = "",
        place: Callable[[], Place] | None = None,
        clock: Callable[[], float] = time.monotonic,
        refresh_seconds: float = _REFRESH_SECONDS,
    ) -> None:
        self._prefix = f"{title} " if title else ""
        self._stride = max(1, math.ceil(total_steps / _PLAIN_LINES))
        self._next_line = resume_step
        self._console = console or Console(stderr=True)
        self._place = place
        self._clock = clock
        self._state = RunState(
            total_steps, began=clock(), title=title, run=run, resume_step=resume_step
        )
        self._lock = threading.Lock()  # of the state
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._footer = None if terminal_size(self._console) is None else Footer(self._console)
        self._plain = self._footer is None
        if self._footer is not None:
            atexit.register(self.close)  # whatever ends the program, its terminal is free again
            if refresh_seconds:
                self._thread = threading.Thread(
                    target=self._watch, args=(refresh_seconds,), name="console", daemon=True
                )
                self._thread.start()

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        """Note that ``step`` has ended, how long it took, and how long it waited for data."""
        with self._lock:
            self._state.end_step(step, seconds, waited_seconds, self._clock())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show the step; without a terminal only the first and one in each twentieth part."""
        with self._lock:
            self._state.log(step, values, self._clock())
        if self._plain and (step >= self._next_line or step == self._state.total_steps):
            line = summary(self._state, values)
            if line:
                self._next_line = (step // self._stride + 1) * self._stride
                self._say(line)

    def draw(self) -> None:
        """Draw the screen as it is now, if there is one."""
        if self._footer is not None:
            self._footer.draw(self._lines(*self._footer.room()))

    def close(self) -> None:
        """Take the screen away and leave what is worth keeping of it; from any thread."""
        footer = self._footer
        if footer is None:
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        lines = self._lines(*footer.room())
        with suppress(OSError):  # the terminal is gone
            footer.clear()
            self._footer = None
            atexit.unregister(self.close)
            state = self._state
            if state.step < state.total_steps:
                for line in lines:
                    self._console.print(line, no_wrap=True)
            else:
                words = summary(state, {**state.values, "eta_seconds": math.nan})
                self._say(f"{words}  in {duration(self._clock() - state.began)}".lstrip())

    def _lines(self, width: int, height: int) -> list[Text]:
        place = self._place() if self._place is not None else None
        with self._lock:
            return screen(
                self._state,
                self._clock(),
                width,
                height,
                place=place,
                ascii_only=self._console.options.ascii_only,
            )

    def _say(self, words: str) -> None:
        """A plain line of where the run stands."""
        state = self._state
        line = f"{self._prefix}step {state.step}/{state.total_steps} {words}"
        # Off a terminal a line is one line, however long.
        self._console.print(line, markup=False, highlight=False, soft_wrap=self._plain)

    def _watch(self, refresh_seconds: float) -> None:
        """Draw until the end, or until the terminal is gone: no reason to end a run."""
        with suppress(OSError):
            self.draw()
            while not self._ended.wait(refresh_seconds):
                self.draw()


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
