"""Where an export goes: what may lie there already, and how it appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cmkd_scale.errors import CmkdError, UsageError
from cmkd_scale.files import sync
from cmkd_scale.operations.exported import DESCRIPTION, read_description


def check_out(out: Path, run: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        UsageError: there is anything but an earlier export, or checkpoints of the run.
    """
    checkpoints = (run / "checkpoints").resolve()
    if out == checkpoints or checkpoints in out.parents:
        raise UsageError(f"{out} lies among the run's checkpoints; choose another --out.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a directory with --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        ours = {DESCRIPTION, *read_description(out).files}
    except CmkdError:
        ours = set()
    others = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if others:
        raise UsageError(
            f"{out} holds what no export has written ({', '.join(others[:5])}); choose another "
            "--out, or remove it."
        )


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` to write into, which takes its place if all goes well.

    What lay there goes last; should this be killed between the two renames, the next export
    finds it.
    """
    temporary, old = (
        out.with_name(f".{out.name}.{os.getpid()}.tmp"),
        out.with_name(f".{out.name}.old"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in out.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(out.name)}\.\d+\.tmp", path.name):
            shutil.rmtree(path)  # of a writer that was killed
    if old.exists():
        shutil.rmtree(old) if out.exists() else old.rename(out)
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
