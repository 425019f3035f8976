"""A run in words: one line of it, or a screen that fits its terminal.

Whatever comes from a config or a log is text, never markup; a number may be missing or odd.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from cmkd_scale.monitoring.console_state import TREND, RunState
from cmkd_scale.monitoring.console_words import (
    age,
    count,
    duration,
    percent,
    plain,
    seconds,
    sparkline,
    tail,
)

Place = tuple[int, str, float]
"""Where this process stands: step, phase, and the seconds since it came there."""

_LABEL = 12  # columns, at least, of what stands before the numbers of a row
_LEAST_BAR = 8  # columns
_NUMBER = 11  # columns of a loss
_GAP = "   "
_DIM, _DONE, _WARN, _BAD = "dim", "cyan", "yellow", "bold red"

_QUIET = 5.0, 2.0  # times the usual step, and seconds: a longer one is worth a word
_HANGS = 20.0, 30.0  # the same: this one looks like a hang

_ALIGNMENT = {
    "alignment_distance/transport": "distance",
    "alignment_marginal_error": "marginal error",
    "alignment_wrong_class_mass": "mass in wrong classes",
    "ring_age_steps": "ring age",
}


def summary(state: RunState, values: Mapping[str, float]) -> str:
    """What a line says of a logged step; empty if ``values`` hold nothing to be shown."""
    parts: list[str] = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.4g}")
    if "learning_rate" in values:
        parts.append(f"lr {values['learning_rate']:.2g}")
    if "samples_per_second" in values:
        parts.append(f"{count(values['samples_per_second'])} samples/s")
    if math.isfinite(eta := values.get("eta_seconds", math.nan)):
        parts.append(f"ETA {duration(eta)}")
    if "test/accuracy" in values:
        parts.append(f"test accuracy {percent(values['test/accuracy'])}")
    if not parts:
        return ""  # for example the record of a checkpoint
    if state.waits_much():
        parts.append(f"data wait {percent(state.waiting_share())}")
    if state.has_slow_rank():
        parts.append(f"slowest {_slowest(state)}")
    return "  ".join([*parts, *_troubles(state)])


def screen(
    state: RunState,
    now: float,
    width: int,
    height: int,
    *,
    place: Place | None = None,
    ascii_only: bool = False,
) -> list[Text]:
    """At most ``height`` lines of at most ``width`` columns.

    Args:
        state: of the run.
        now: seconds of the state's clock.
        width: columns.
        height: lines; the least important are left out.
        place: of this process, if it is known.
        ascii_only: whether the terminal shows nothing else.
    """
    page = _Page(state, now, width, place, ascii_only)
    rows = page.rows(stacked=True)
    if len(rows) > height:
        rows = page.rows(stacked=False)
    by_rank = sorted(range(len(rows)), key=lambda number: (rows[number][0], number))
    lines = [rows[number][1] for number in sorted(by_rank[:height])]
    for line in lines:
        line.truncate(width)
        if ascii_only:
            line.plain = line.plain.encode("ascii", "replace").decode()
    return lines


@dataclass(frozen=True)
class _Page:
    """Makes the rows of a screen: a line, and its rank; the highest are left out first."""

    state: RunState
    now: float
    width: int
    place: Place | None
    ascii_only: bool

    def rows(self, *, stacked: bool) -> list[tuple[int, Text]]:
        """From top to bottom; with a row for each component of the loss, or all in one."""
        rows = list(self._cells(stacked))
        # As long as the labels are, unless numbers and trends would lack room.
        longest = max(cell_len(label) for _, label, cells in rows if cells) + 1
        most = max(_LABEL, self.width - _NUMBER - TREND, 3 * self.width // 10)
        edge = min(max(_LABEL, longest), most)
        return [
            (3, self._header()),
            (0, self._progress()),
            *((rank, self._line(label, edge, cells)) for rank, label, cells in rows if cells),
        ]

    def _cells(self, stacked: bool) -> Iterator[tuple[int, str, list[Text]]]:
        """Rank, label and cells of each row; a row without cells has nothing to say."""
        state, values = self.state, self.state.values
        names = [name for name in state.trends if name != "loss"]
        names = names if len(names) > 1 else []  # one alone is the loss itself
        total = [self._loss("loss")] if "loss" in values else []
        inline = [] if stacked else self._named({name: tail(name) for name in names})
        yield 2, "loss", [*total, *inline]
        for name in names if stacked else ():
            yield 9, f"  {tail(name)}", [self._loss(name)]
        yield 4, "speed", self._speed()
        slow = state.has_slow_rank()
        text = Text(_slowest(state), _WARN if slow else "")
        yield 1 if slow else 8, "slowest", [text] if "slowest_rank_ratio" in values else []
        yield 7, "optimiser", self._named({"learning_rate": "lr", "grad_norm": "gradient norm"})
        yield 6, "guard", self._named({"guard_weight": "weight"})
        yield 8, "alignment", self._named(_ALIGNMENT)
        yield 6, "test", self._named({n: tail(n) for n in values if n.startswith("test/")})
        yield 5, "checkpoint", self._checkpoint()
        yield 3, "trouble", [Text(text, _WARN) for text in _troubles(state)]
        yield 1, "now", self._standing()

    def _line(self, label: str, edge: int, cells: Sequence[Text]) -> Text:
        words = Text(plain(label), _DIM)
        words.truncate(edge - 1, overflow="crop" if self.ascii_only else "ellipsis", pad=True)
        return Text.assemble(words, " ", _join(cells, self.width - edge))

    def _header(self) -> Text:
        """A rule that says what runs; the log is above it."""
        state, rule = self.state, "-" if self.ascii_only else "─"
        text = Text().append(rule * 2, _DIM).append(f" {plain(state.title) or 'run'} ", "bold")
        run = plain(state.run)
        room = self.width - text.cell_len - 5
        if run and room > _LEAST_BAR:
            if cell_len(run) > room:  # a path is known by its end
                run = "..." + set_cell_size(run[::-1], room - 3)[::-1]
            text.append(rule * 2, _DIM).append(f" {run} ")
        return text.append(rule * (self.width - text.cell_len), _DIM)

    def _progress(self) -> Text:
        state = self.state
        step = f"{state.step:>{len(str(state.total_steps))}}/{state.total_steps}"
        cells = [Text(step, "bold")]
        if math.isfinite(eta := state.eta_seconds()):
            cells.append(_cell("ETA", duration(eta)))
        cells.append(_cell("elapsed", duration(self.now - state.began)))
        if "epoch_progress" in state.values:
            cells.append(_cell("epoch", percent(state.values["epoch_progress"])))
        numbers = _join(cells, self.width - _LEAST_BAR - len(_GAP))
        length = max(self.width - numbers.cell_len - len(_GAP), 0)
        share = state.step / max(state.total_steps, 1)
        done = int(length * min(max(share, 0.0), 1.0))
        full, empty = ("#", ".") if self.ascii_only else ("━", "─")
        bar = Text().append(full * done, _DONE).append(empty * (length - done), _DIM)
        return Text.assemble(bar, _GAP, numbers)

    def _loss(self, name: str) -> Text:
        """The value, and how it went lately."""
        text = _number(self.state.values[name])
        if self.ascii_only:
            return text
        text.pad_right(max(_NUMBER - text.cell_len, 1))
        return Text.assemble(text, (sparkline(self.state.trends[name]), _DONE))

    def _named(self, words: Mapping[str, str]) -> list[Text]:
        """Cells of the logged values among ``words``, named by them."""
        values = self.state.values
        return [
            _cell(plain(word), _number(values[name]))
            for name, word in words.items()
            if name in values
        ]

    def _speed(self) -> list[Text]:
        state, cells = self.state, []
        if "samples_per_second" in state.values:
            cells.append(Text(f"{count(state.values['samples_per_second'])} samples/s"))
        if (usual := state.usual_seconds()) is not None:
            waiting = f"data wait {percent(state.waiting_share())}"
            cells.append(Text(waiting, _WARN if state.waits_much() else ""))
            cells.append(Text(f"{seconds(usual)} a step"))
        return cells

    def _checkpoint(self) -> list[Text]:
        state, values = self.state, self.state.values
        if state.checkpoint_at is None:
            cells = [Text("none yet")]
        else:
            cells = [Text(f"{age(self.now - state.checkpoint_at)} ago")]
            cells.append(_cell("took", seconds(values["checkpoint_seconds"])))
        if "checkpoint_stall_seconds" in values:
            cells.append(_cell("training waited", seconds(values["checkpoint_stall_seconds"])))
        if state.resume_step:
            cells.append(_cell("continued from step", str(state.resume_step)))
        if values.get("restarts/resume"):
            cells.append(_cell("resumes", count(values["restarts/resume"])))
        return cells

    def _standing(self) -> list[Text]:
        """Where this process is, if a step takes longer than usual."""
        state = self.state
        quiet, usual = self.now - state.moved_at, state.usual_seconds()
        cells = []
        if state.step == state.resume_step:
            cells.append(Text("before the first step"))
        elif usual is None:
            return []
        elif quiet > max(_HANGS[0] * usual, _HANGS[1]):
            cells.append(Text(f"no step for {age(quiet)}; usual {seconds(usual)}", _BAD))
        elif quiet <= max(_QUIET[0] * usual, _QUIET[1]):
            return []
        if self.place is not None:
            _, phase, since = self.place
            waits = ", waiting for other ranks" if phase == "exchange" and self._many() else ""
            cells.append(Text(f"in {plain(phase)} for {age(since)}{waits}"))
        return cells

    def _many(self) -> bool:
        return "slowest_rank" in self.state.values  # which a rank alone does not log


def _troubles(state: RunState) -> list[str]:
    """What went wrong since this process began, a few words each."""
    sums, values = state.sums, state.values
    damaged = {tail(n): c for n, c in sums.items() if n.startswith("samples_skipped/") and c}
    texts = []
    if skipped := sums.get("steps_skipped"):
        texts.append(f"skipped steps {count(skipped)}")
    if damaged:
        kinds = ", ".join(f"{plain(reason)} {count(c)}" for reason, c in damaged.items())
        texts.append(f"damaged samples {count(sum(damaged.values()))} ({kinds})")
    if bad := values.get("bad_samples_ratio"):
        texts.append(f"damaged share {percent(bad)}")
    if retries := sums.get("read_retries"):
        texts.append(f"retried reads {count(retries)}")
    if failures := sums.get("checkpoint_failures"):
        texts.append(f"failed checkpoints {count(failures)}")
    if rollbacks := values.get("restarts/rollback"):
        texts.append(f"roll backs {count(rollbacks)}")
    return texts


def _slowest(state: RunState) -> str:
    rank = state.values.get("slowest_rank", math.nan)
    ratio = state.values.get("slowest_rank_ratio", math.nan)
    return f"rank {rank:.6g}, {ratio:.3g}x the others"


def _join(cells: Sequence[Text], room: int) -> Text:
    """As many cells as there is room for, the first in any case."""
    line = Text()
    for cell in cells:
        gap = _GAP if line else ""
        if line and line.cell_len + len(gap) + cell.cell_len > room:
            break
        line.append(gap).append_text(cell)
    return line


def _cell(word: str, number: str | Text) -> Text:
    return Text.assemble((f"{word} ", _DIM), number)


def _number(value: float) -> Text:
    return Text(f"{value:.4g}", "" if math.isfinite(value) else _BAD)
