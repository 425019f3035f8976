"""Checkpoints: atomic save, load of the newest valid one, verify, prune. No pickle.

A checkpoint is a directory ``step_00001000`` with safetensors and JSON files, a
``manifest.json`` holding the SHA-256 of each, and an empty file COMPLETE. It is written
under a temporary name and renamed, and the older ones go only after the new one is in
place, so that being killed at any instant leaves the newest complete one valid.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from cmkd_scale.errors import IntegrityError, UsageError

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped."""

    state: dict[str, Any]
    """Plain values: step, samples seen, place in the data, digests."""
    files: dict[str, dict[str, Tensor]]
    """Relative file name (``model.safetensors``, ``optimizer/state.safetensors``) -> tensors."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``checkpoint`` below ``directory`` and prune to the newest ``keep``.

    Called on one rank. Returns the checkpoint's directory.

    Raises:
        UsageError: the directory cannot be written (permissions, disk full).
    """
    final = directory / f"step_{int(checkpoint.state['step']):08d}"
    if final.is_dir() and not problems(final):
        return final
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        _clear_leftovers(directory)
        _write(temporary, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(directory)
        _point_latest(directory, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UsageError(
            f"The checkpoint {final} cannot be written: {error}. Free space or make the run "
            "directory writable and start the same command again; earlier checkpoints are "
            "untouched."
        ) from None
    for old in _candidates(directory)[keep:]:
        shutil.rmtree(old)
    return final


def load_newest(directory: Path) -> tuple[Checkpoint, Path] | None:
    """The newest valid checkpoint and its directory; None if there is none at all.

    Raises:
        IntegrityError: checkpoints are there, but none is valid.
    """
    faults = []
    for candidate in _candidates(directory):
        found = problems(candidate)
        if not found:
            return _read(candidate), candidate
        faults.append(f"{candidate.name}: {found[0]}")
    if faults:
        raise IntegrityError(
            f"No checkpoint in {directory} is valid ({'; '.join(faults)}). Restore one from a "
            "copy, or remove the directory to start the run again."
        )
    return None


def problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint directory; empty when it is valid."""
    if not (checkpoint / COMPLETE).is_file():
        return ["it was never completed (no file COMPLETE)"]
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        digests: dict[str, str] = manifest["sha256"]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"its {MANIFEST} cannot be read ({error})"]
    if version != FORMAT_VERSION:
        return [f"its format is version {version}, this program reads {FORMAT_VERSION}"]
    found = []
    for name, digest in sorted(digests.items()):
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif file_digest(path) != digest:
            found.append(f"{name} does not match its SHA-256")
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(target: Path, checkpoint: Checkpoint) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, tensors in checkpoint.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(path))
    _write_json(target / "state.json", checkpoint.state)
    names = [*checkpoint.files, "state.json"]
    digests = {name: file_digest(target / name) for name in names}
    _write_json(target / MANIFEST, {"format_version": FORMAT_VERSION, "sha256": digests})
    (target / COMPLETE).touch()
    for path in [*target.rglob("*"), target]:
        _sync(path)


def _read(checkpoint: Path) -> Checkpoint:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    state = json.loads((checkpoint / "state.json").read_text())
    files = {
        name: load((checkpoint / name).read_bytes())
        for name in manifest["sha256"]
        if name.endswith(".safetensors")
    }
    return Checkpoint(state=state, files=files)


def _candidates(directory: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    found = [path for path in directory.glob("step_*") if path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _clear_leftovers(directory: Path) -> None:
    """Remove temporary directories of writers that were killed."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob(".step_*.tmp"):
        shutil.rmtree(path)


def _point_latest(directory: Path, target: Path) -> None:
    temporary = directory / f".{LATEST}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, directory / LATEST)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that a power cut keeps the rename's order."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
