"""What a prediction is asked for: names to the bytes of files, without trust in either."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from cmkd_scale.data.modalities import MODALITIES, Modality
from cmkd_scale.errors import EXIT_USAGE, UsageError

_MAX_BYTES, _MAX_TEXT_BYTES = 256 * 2**20, 2**20

_MAX_NAME_BYTES = 4096  # a path cannot be longer on Linux


class Source(NamedTuple):
    """One thing to predict."""

    kind: Literal["file", "text"]
    name: str
    """Of the file, or the text itself."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be predicted."""

    source: Source
    error: str
    """Why, in a sentence."""
    exit_code: int
    """42: it was read, and is damaged or of another kind; 2: it could not be read."""


def max_bytes(modality: Modality) -> int:
    """Larger files are refused unread."""
    # A tokenizer goes through all of a text before it leaves out what is too much.
    return _MAX_TEXT_BYTES if "txt" in modality.extensions else _MAX_BYTES


def find(names: Iterable[str], modality: Modality) -> Iterator[Source | Failure]:
    """Files by their names, one at a time; a directory stands for the files below it.

    Of those, the ones that end in an extension of the modality and are not hidden: in each
    directory its files before its subdirectories, both by name. Links to directories are not
    followed. A file that is named itself is taken whatever its extension.
    """
    for name in names:
        if os.path.isdir(name):
            yield from _below(name, modality)
        else:
            yield Source("file", name)


def names_in(stream: BinaryIO) -> Iterator[str]:
    """One a line; empty lines count for nothing.

    Raises:
        UsageError: a line is too long to be a name.
    """
    while line := stream.readline(_MAX_NAME_BYTES + 2):
        if len(line) > _MAX_NAME_BYTES + 1:
            raise UsageError(
                "What standard input holds are not names of files, one a line: pipe the output "
                "of a command such as `find DIR -name '*.png'`."
            )
        if name := line.removesuffix(b"\n"):
            yield os.fsdecode(name)


def read_file(name: str, modality: Modality) -> bytes:
    """The content of a file that may hold a sample of the modality.

    Raises:
        UsageError: it is named as of another modality, is not there, no regular file or too
            large.
    """
    _check_kind(name, modality)
    try:
        # Asked before it is opened: the opening alone of a pipe would wait, that of a device act.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise UsageError("it is not a regular file.")
        with open(name, "rb", opener=_open) as file:
            size, most = os.fstat(file.fileno()).st_size, max_bytes(modality)
            if size > most:
                raise UsageError(
                    f"it has {size / 2**20:.1f} MiB; at most {most // 2**20} MiB are read."
                )
            return file.read(size)
    except OSError as error:
        raise UsageError(f"it cannot be read ({error.strerror}).") from None
    except ValueError:
        raise UsageError("no file can have this name.") from None  # a zero byte, for example


def _open(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def _check_kind(name: str, modality: Modality) -> None:
    extension = _extension(name)
    if modality.wants(extension):
        return
    for other, kind in MODALITIES.items():
        if extension in kind.extensions and extension not in modality.extensions:
            raise UsageError(
                f"its name is one of {other}; this model reads {_wanted(modality)} files."
            )


def _below(root: str, modality: Modality) -> Iterator[Source | Failure]:
    directories, found = [root], False
    while directories:
        directory = directories.pop()
        try:
            with os.scandir(directory) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield _unusable(directory, f"it cannot be read ({error.strerror}).")
            found = True  # what is in it is not known
            continue
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        inner = [entry.path for entry in shown if entry.is_dir(follow_symlinks=False)]
        directories += reversed(inner)
        for entry in shown:
            if modality.wants(_extension(entry.name)) and not os.path.isdir(entry.path):
                found = True
                yield Source("file", entry.path)
    if not found:
        yield _unusable(root, f"it is a directory without {_wanted(modality)} files.")


def _unusable(name: str, error: str) -> Failure:
    return Failure(Source("file", name), error, EXIT_USAGE)


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].removeprefix(".").lower()


def _wanted(modality: Modality) -> str:
    *others, last = filter(modality.wants, modality.extensions)
    return f"{', '.join(others)} or {last}" if others else last
