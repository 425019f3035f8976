"""The name of a run: written once into its directory, the same in every requeue and rank."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from cmkd_scale.errors import IntegrityError
from cmkd_scale.files import write_atomically

FILE = "run_id"

# What a Kubernetes label, a W&B id and a path all take.
_VALID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def run_id(directory: Path) -> str:
    """The id of the run that lives in ``directory``; made at its first call there.

    It begins with the directory's name, for people, and ends in eight random hexadecimal digits,
    since two directories may have one name. Where several processes share the directory, one of
    them must have returned from here before the others call.

    Args:
        directory: of the run; it exists.

    Raises:
        IntegrityError: the file holds something else.
        OSError: it cannot be written.
    """
    file = directory / FILE
    if not file.exists():
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name)[:48].strip("._-")
        made = f"{name or 'run'}-{secrets.token_hex(4)}"
        write_atomically(file, f"{made}\n".encode())
    found = file.read_bytes().decode(errors="replace").strip()
    if not _VALID.fullmatch(found):
        raise IntegrityError(
            f"{file} is damaged: it should hold one word, the run's id. Restore it from a copy, or "
            "delete it; trackers then take what follows for a new run."
        )
    return found
