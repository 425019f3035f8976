"""The console sink: plain lines elsewhere, and on a terminal what a person sees and is left."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest
from rich.console import Console

from cmkd_scale.monitoring.console import ConsoleSink
from tests.monitoring.terminals import Terminal


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestPlainLines:
    def lines(self, total: int, every: int, resume: int = 0) -> list[str]:
        console = plain()
        sink = ConsoleSink(total, title="student", resume_step=resume, console=console)
        for step in range(resume + every, total + 1, every):
            sink.log(step, {"loss": 1.23456, "samples_per_second": 812.4, "eta_seconds": 3700.0})
            sink.log(step, {"checkpoint_seconds": 0.1})
        sink.close()
        return written(console).splitlines()

    @pytest.mark.parametrize(
        ("total", "every"), [(400, 10), (400, 1), (7, 1), (1_000_000, 1000), (100, 33)]
    )
    def test_are_few(self, total: int, every: int) -> None:
        lines = self.lines(total, every)
        assert min(total // every, 15) <= len(lines) <= 22
        steps = [int(re.findall(r"step (\d+)/", line)[0]) for line in lines]
        assert steps[0] == every
        assert steps == sorted(set(steps))
        assert steps[-1] == total // every * every or total % every

    def test_say_what_matters(self) -> None:
        expected = "student step 10/400 loss 1.235  812 samples/s  ETA 1:01:40"
        assert self.lines(400, 10)[0] == expected

    def test_of_a_resumed_run_come_at_once(self) -> None:
        assert "step 210/400" in self.lines(400, 10, resume=200)[0]

    def test_say_what_is_wrong_since_the_beginning(self) -> None:
        console = plain()
        sink = ConsoleSink(100, console=console)
        sink.step(1, 1.0, 0.25)
        sink.log(1, {"loss": 2.0})
        sink.log(2, {"steps_skipped": 1.0})
        sink.log(3, {"loss": 1.5})  # not shown
        sink.log(5, {"loss": 1.0, "slowest_rank": 3.0, "slowest_rank_ratio": 1.8})
        assert written(console).splitlines() == [
            "step 1/100 loss 2  data wait 25.0%",
            "step 5/100 loss 1  data wait 25.0%  slowest rank 3, 1.8x the others  skipped steps 1",
        ]

    def test_have_no_markup(self) -> None:
        console = plain()
        ConsoleSink(1, title="[red]x[/red]", console=console).log(1, {"loss": 1.0})
        assert written(console).startswith("[red]x[/red] step 1/1")

    def test_are_what_a_dumb_terminal_gets(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
        sink = ConsoleSink(1, console=console)
        sink.log(1, {"loss": 1.0})
        sink.close()
        assert written(console) == "step 1/1 loss 1\n"


class TestLive:
    def sink(self, terminal: Terminal, clock: Clock, title: str = "student") -> ConsoleSink:
        return ConsoleSink(
            400, title=title, console=terminal.console, clock=clock, refresh_seconds=0
        )

    @pytest.mark.parametrize(("columns", "lines"), [(40, 10), (80, 24), (160, 50)])
    def test_a_screen_below_the_log(self, columns: int, lines: int) -> None:
        terminal, clock = Terminal(columns, lines), Clock()
        # Made before the sink and with the stream itself, as the command line's is.
        handler = logging.StreamHandler(terminal)
        sink = self.sink(terminal, clock)
        for step in range(1, 41):
            clock.now += 0.5
            sink.step(step, 0.5, 0.0)
            sink.log(step, {"loss": 1.0 / step, "samples_per_second": 812.0})
            handler.handle(logging.makeLogRecord({"msg": f"warning {step}"}))
            sink.draw()
        shown = terminal.lines()
        above = [line for line in terminal.transcript() if line.startswith("warning")]
        assert above == [f"warning {step}" for step in range(1, 41)]
        assert any(line.startswith("── student ─") for line in shown)
        assert any(" 40/400 " in line for line in shown)
        assert not any("warning" in line for line in shown[-4:])
        sink.close()

    def test_numbers_age_between_steps(self) -> None:
        terminal, clock = Terminal(80, 24), Clock()
        sink = self.sink(terminal, clock)
        sink.step(1, 0.4, 0.0)
        sink.log(1, {"loss": 1.0})
        clock.now = 95.0
        sink.draw()
        assert terminal.lines()[-1] == "now         no step for 95 s; usual 0.4 s"
        sink.step(2, 95.0, 0.0)
        sink.draw()
        assert "now" not in terminal.lines()[-1]

    def test_a_run_that_ends_well_leaves_one_line(self) -> None:
        terminal, clock = Terminal(80, 24), Clock()
        sink = self.sink(terminal, clock)
        sink.log(400, {"loss": 1.5, "learning_rate": 1e-3, "eta_seconds": 0.0})
        sink.draw()
        clock.now = 62.0
        sink.close()
        sink.close()
        assert [line for line in terminal.transcript() if line] == [
            "student step 400/400 loss 1.5  lr 0.001  in 0:01:02"
        ]

    def test_another_leaves_the_screen_as_it_stood(self) -> None:
        terminal, clock = Terminal(80, 24), Clock()
        sink = self.sink(terminal, clock, title="[red]x[/red]")
        sink.log(100, {"loss": 1.5})
        sink.log(100, {"checkpoint_seconds": 0.1})
        sink.draw()
        terminal.write("^C")  # as the terminal echoes it
        sink.close()
        terminal.write("next\n")
        left = [line for line in terminal.transcript() if line]
        assert left[0] == "^C"
        assert left[1].startswith("── [red]x[/red] ─")
        assert "100/400" in left[2]
        assert left[3].startswith("loss        1.5")
        assert left[4:] == ["checkpoint  0 s ago   took 0.1 s", "next"]

    def test_a_thread_draws(self) -> None:
        terminal, looked = Terminal(80, 24), threading.Semaphore(0)

        def place() -> tuple[int, str, float]:
            looked.release()
            return 0, "start", 0.0

        sink = ConsoleSink(
            400, console=terminal.console, place=place, clock=Clock(), refresh_seconds=0.001
        )
        for _ in range(3):  # the second look comes after the first has been drawn
            assert looked.acquire(timeout=60)
        assert "in start for 0 s" in terminal.getvalue()
        sink.close()
        assert "console" not in {thread.name for thread in threading.enumerate()}

    def test_no_colour_where_none_is_wanted(self) -> None:
        terminal, clock = Terminal(80, 24), Clock()
        terminal.console.no_color = True
        sink = self.sink(terminal, clock)
        sink.log(1, {"loss": 1.0, "slowest_rank": 3.0, "slowest_rank_ratio": 2.0})
        sink.draw()
        sink.close()
        codes = set(re.findall(r"\x1b\[([\d;]*)m", terminal.getvalue()))
        assert codes <= {"", "0", "1", "2"}  # bold and dim are no colours

    def test_a_terminal_that_goes_away_ends_nothing(self) -> None:
        terminal, clock = Terminal(80, 24), Clock()
        sink = ConsoleSink(400, console=terminal.console, clock=clock, refresh_seconds=0.001)
        gone = threading.Event()

        def fail(text: str) -> int:
            gone.set()
            raise OSError("Input/output error")

        terminal.write = fail  # type: ignore[method-assign]
        sink.log(1, {"loss": 1.0})
        assert gone.wait(60)
        sink.step(2, 1.0, 0.0)
        sink.close()
