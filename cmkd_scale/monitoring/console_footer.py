"""Lines that stay at the bottom of a terminal while everything else scrolls above them.

The terminal itself keeps them apart (its scrolling region), so nothing has to be intercepted:
what other ranks, data workers and C libraries write to the same terminal stays readable, which
a display that is erased and drawn again at the cursor (rich's ``Live``) would take with it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

_LOG_LINES = 3  # at least, and a quarter of the terminal, are left to everything else
_LEAST_COLUMNS, _LEAST_LINES = 20, 6

_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor
_ERASE_BELOW, _ERASE_RIGHT = "\x1b[J", "\x1b[K"
_DOWN = "\x1bD"  # one line, in the same column; scrolls at the bottom
_RELEASE = "\x1b[r"  # the whole terminal scrolls again; takes the cursor home, like _KEEP
_KEEP = "\x1b[1;{}r"  # only these lines scroll


def terminal_size(console: Console) -> tuple[int, int] | None:
    """Columns and lines of the terminal behind ``console``; None if lines can't be kept on it."""
    if not console.is_interactive:
        return None  # no terminal, or a dumb one
    try:
        columns, lines = os.get_terminal_size(console.file.fileno())
    except io.UnsupportedOperation:  # text in memory
        columns, lines = console.size
    except (OSError, ValueError):  # no terminal, whatever the environment says, or closed
        return None
    return (columns, lines) if columns >= _LEAST_COLUMNS and lines >= _LEAST_LINES else None


class Footer:
    """The lines, on the terminal of ``console``; for use by one thread at a time.

    The cursor stays visible, so a process that is killed leaves nothing behind but the kept
    lines; ``reset`` or the next footer frees them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shape: tuple[int, int, int] | None = None  # columns and lines of the terminal; ours
        self._drawn: list[str] = []

    def room(self) -> tuple[int, int]:
        """Columns and lines that may be drawn at present; (0, 0) while there is no terminal."""
        size = terminal_size(self._console)
        if size is None:
            return 0, 0
        columns, lines = size
        # What is erased to the right of a full line would be its last letter.
        return columns - 1, lines - max(_LOG_LINES, lines // 4)

    def draw(self, lines: Sequence[Text]) -> None:
        """Show these lines, as many and as wide as ``room`` has it, in place of those before."""
        size = terminal_size(self._console)
        if size is None:
            self.clear()
            return
        columns, height = size
        drawn = self._render(lines, columns - 1)
        if self._shape is not None and self._shape[:2] == size:
            drawn = [""] * (self._shape[2] - len(drawn)) + drawn  # or the log would jump
        shape = (columns, height, len(drawn))
        if shape == self._shape and drawn == self._drawn:
            return
        top = height - len(drawn)
        frame = "" if shape == self._shape else self._make_room(len(drawn))
        frame += _SAVE + _KEEP.format(top)
        for number, line in enumerate(drawn, start=top + 1):
            frame += f"\x1b[{number};1H{line}{_ERASE_RIGHT}"
        self._shape, self._drawn = shape, drawn
        self._write(frame + _RESTORE)

    def clear(self) -> None:
        """Take the lines away; the cursor stands where they were, at the beginning of a line."""
        if self._shape is not None:
            # Of a line begun by somebody else, so many blanks reach the next one; of an empty
            # line they reach the end, and no further.
            blanks = " " * self._shape[0]
            self._shape = None
            self._write(_SAVE + _RELEASE + _RESTORE + f"{blanks}\r{_ERASE_BELOW}")

    def _make_room(self, lines: int) -> str:
        """Have as many lines below the cursor's, and nothing in them."""
        room = _DOWN * lines + f"\x1b[{lines}A"
        # Not from the cursor on: behind a full line, that would be the line's last letter.
        erase = _SAVE + _DOWN + "\r" + _ERASE_BELOW + _RESTORE
        return _SAVE + _RELEASE + _RESTORE + room + erase

    def _render(self, lines: Sequence[Text], width: int) -> list[str]:
        """Each line with the codes of its colours, where the terminal has any."""
        with self._console.capture() as capture:
            self._console.print(Text("\n").join(lines), no_wrap=True, width=width, end="")
        return capture.get().split("\n")

    def _write(self, text: str) -> None:
        """In one piece, so that nobody else's text gets between."""
        self._console.file.write(text)
        self._console.file.flush()
