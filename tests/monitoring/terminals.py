"""A terminal in memory, as an emulator of its own has it: what a person would see."""

from __future__ import annotations

import io

import pyte
from rich.console import Console


class Terminal(io.StringIO):
    """Takes what is written to it, as text and as a screen with all that scrolled off it."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.Stream(self.screen)
        self.console = Console(
            file=self,
            width=columns,
            height=lines,
            force_terminal=True,
            force_interactive=True,  # whatever TERM says where the tests run
            color_system="standard",
            legacy_windows=False,
            _environ={},
        )

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))  # as the driver of any terminal does
        return super().write(text)

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self.console.size = (columns, lines)

    def lines(self) -> list[str]:
        """Of the screen."""
        return [line.rstrip() for line in self.screen.display]

    def transcript(self) -> list[str]:
        """All lines from the first one written to the last one of the screen."""
        gone = [
            "".join(line[column].data for column in range(self.screen.columns)).rstrip()
            for line in self.screen.history.top
        ]
        return [*gone, *self.lines()]
