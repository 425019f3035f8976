"""Small files that are there with all of their content, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmkd_scale.errors import IntegrityError


def to_json(value: Mapping[str, Any]) -> bytes:
    """JSON with sorted keys: equal values give equal bytes.

    Raises:
        ValueError: a number is not finite, which JSON cannot express.
    """
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """Read what ``to_json`` made.

    Args:
        path: of the file.
        remedy: a sentence for the message; None: to build again what it is of.

    Raises:
        IntegrityError: the file holds anything but a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        remedy = remedy or f"Delete {path.parent} and build again."
        raise IntegrityError(f"{path} is damaged. {remedy}")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Write and sync a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
