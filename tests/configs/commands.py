"""The commands that the comments of a config tell its reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

_INDENTED = re.compile(r"# {4,}(.*)")


def commands_in(file: Path) -> list[list[str]]:
    """The words of each line that is indented in a comment; a backslash continues it."""
    lines = [match[1] for line in file.read_text().splitlines() if (match := _INDENTED.match(line))]
    text = "\n".join(lines).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line))]


def builds(file: Path) -> list[list[str]]:
    """Those that build shards."""
    return [words for words in commands_in(file) if words[:3] == ["cmkd", "shards", "build"]]
