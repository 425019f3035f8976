"""Kept lines against an emulated terminal, and against one that has none."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from cmkd_scale.monitoring.console_footer import Footer, terminal_size
from tests.monitoring.terminals import Terminal

COLUMNS, LINES = 24, 12


def kept(count: int) -> list[Text]:
    return [Text(f"kept {number} of {count}") for number in range(1, count + 1)]


def stripped(lines: list[str]) -> list[str]:
    return "\n".join(lines).rstrip().split("\n")


@given(
    st.lists(
        st.integers(1, 9)  # draw so many lines
        | st.text("abc xyz", max_size=60)  # others write a part of a line
        | st.text("abc xyz", max_size=60).map(lambda text: f"{text}\n"),
        max_size=40,
    )
)
def test_what_others_write_stands_above_as_if_there_were_no_footer(
    actions: list[int | str],
) -> None:
    terminal, without = Terminal(COLUMNS, LINES), Terminal(COLUMNS, LINES)
    footer, most, last = Footer(terminal.console), 0, 0
    for action in actions:
        if isinstance(action, str):
            terminal.write(action)
            without.write(action)
        elif terminal.screen.cursor.x < COLUMNS:  # behind a full line, emulators restore it unalike
            footer.draw(kept(action))
            most, last = max(most, action), action
        if most:
            shown = terminal.lines()
            assert shown[LINES - last :] == [line.plain for line in kept(last)]
            assert shown[LINES - most : LINES - last] == [""] * (most - last)
    above = terminal.transcript()
    assert stripped(above[: len(above) - most]) == stripped(without.transcript())
    footer.clear()
    terminal.write("next")
    if most:
        assert stripped(terminal.transcript())[-1] == "next"
    assert not any("kept" in line for line in terminal.transcript())


def test_afterwards_the_whole_terminal_scrolls_again() -> None:
    terminal = Terminal(COLUMNS, LINES)
    footer = Footer(terminal.console)
    footer.draw(kept(4))
    footer.clear()
    for number in range(30):
        terminal.write(f"{number}\n")
    assert terminal.lines() == [*map(str, range(19, 30)), ""]


def test_a_resized_terminal_has_the_lines_at_its_new_bottom() -> None:
    terminal = Terminal(40, 20)
    footer = Footer(terminal.console)
    terminal.write("log\n" * 30)
    for columns, lines in ((30, 14), (60, 30), (22, 30)):
        footer.draw(kept(5))
        terminal.resize(columns, lines)
        footer.draw(kept(5))
        terminal.write("more\n" * 3)
        shown = terminal.lines()
        assert shown[-5:] == [line.plain for line in kept(5)]
        assert sum("kept" in line for line in shown) == 5
        assert "more" in shown[:-5]


def test_the_same_lines_are_written_once() -> None:
    terminal = Terminal(COLUMNS, LINES)
    footer = Footer(terminal.console)
    footer.draw(kept(3))
    written = len(terminal.getvalue())
    footer.draw(kept(3))
    assert len(terminal.getvalue()) == written


def test_lines_too_long_are_cut_and_brackets_are_text() -> None:
    terminal = Terminal(COLUMNS, LINES)
    Footer(terminal.console).draw([Text("[red]" + "x" * 90), Text("end")])
    assert terminal.lines()[-2:] == ["[red]" + "x" * (COLUMNS - 1 - 5), "end"]


def test_the_cursor_is_never_hidden() -> None:  # a killed process could not show it again
    terminal = Terminal(COLUMNS, LINES)
    footer = Footer(terminal.console)
    footer.draw(kept(3))
    assert "\x1b[?25l" not in terminal.getvalue()
    assert footer.room() == (COLUMNS - 1, LINES - 3)


def test_a_terminal_that_is_too_small_for_a_while_is_left_alone() -> None:
    terminal = Terminal(COLUMNS, LINES)
    footer = Footer(terminal.console)
    footer.draw(kept(3))
    terminal.resize(10, 3)
    assert footer.room() == (0, 0)
    footer.draw(kept(3))
    terminal.write("log\n" * 2)
    assert terminal.lines() == ["log", "log", ""]
    terminal.resize(COLUMNS, LINES)
    footer.draw(kept(3))
    assert terminal.lines()[-3:] == [line.plain for line in kept(3)]


@contextmanager
def pseudo_terminal(columns: int, lines: int) -> Iterator[int]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    try:
        yield theirs
    finally:
        os.close(ours)
        os.close(theirs)


class TestTerminalSize:
    def of(self, descriptor: int, **environment: str) -> tuple[int, int] | None:
        with open(descriptor, "w", closefd=False) as file:
            return terminal_size(Console(file=file, _environ={"TERM": "xterm", **environment}))

    def test_is_that_of_the_descriptor_not_of_the_environment(self) -> None:
        with pseudo_terminal(100, 30) as descriptor:
            assert self.of(descriptor, COLUMNS="80", LINES="24") == (100, 30)

    def test_dumb_small_or_without_a_size(self) -> None:
        with pseudo_terminal(100, 30) as descriptor:
            assert self.of(descriptor, TERM="dumb") is None
        for columns, lines in ((0, 0), (19, 30), (80, 5)):
            with pseudo_terminal(columns, lines) as descriptor:
                assert self.of(descriptor) is None

    def test_a_file_is_no_terminal_whatever_the_environment_says(self) -> None:
        read, write = os.pipe()
        try:
            assert self.of(write, FORCE_COLOR="1", TTY_COMPATIBLE="1") is None
        finally:
            os.close(read)
            os.close(write)
