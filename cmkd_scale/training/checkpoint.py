"""Checkpoints: atomic save, load of the newest valid one, verify, prune. No pickle.

A checkpoint is a directory ``step_00001000`` with safetensors and JSON files, a
``manifest.json`` holding the SHA-256 of each, and an empty file COMPLETE. It is written
under a temporary name and renamed, and the older ones go only after the new one is in
place and was read back, so that being killed at any instant leaves the newest complete one
valid. Tensors are whole, under the names that one process would give them: what any number of
processes has written, any number can take up.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest, sync, to_json
from cmkd_scale.training.tensor_file import write_tensors

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step_\d{8,}")  # a copy beside it, with a suffix, is not ours to prune

COMPLETE = "COMPLETE"
MANIFEST = "manifest.json"
LATEST = "latest"
FORMAT_VERSION = 1
_MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped."""

    state: dict[str, Any]
    """Plain values: step, samples seen, place in the data, digests."""
    files: dict[str, dict[str, Tensor]]
    """Relative file name (``model.safetensors``, ``optimizer/state.safetensors``) -> tensors."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """File name -> content stored as it is: the memory, which has a reader of its own."""


def blob_name(number: int) -> str:
    """File of the memory ``number`` of a run; that of the only one is ``memory.safetensors``."""
    return f"{_MEMORY}{f'_{number}' if number else ''}.safetensors"


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``checkpoint`` below ``directory`` and prune to the newest ``keep``.

    Called on one rank. Returns the checkpoint's directory.

    Raises:
        UsageError: the directory cannot be written (permissions, disk full).
    """
    final = directory_of(directory, checkpoint.state)
    if final.is_dir() and not problems(final):
        return final
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        _clear_leftovers(directory)
        if final.exists():
            shutil.rmtree(final)  # it is damaged
        _write(temporary, checkpoint)
        os.rename(temporary, final)
        sync(directory)
        found = problems(final)
        if found:
            raise OSError(f"read back, {found[0]}")
        _point_latest(directory, final)
        _prune(directory, final, keep)
    except OSError as error:
        raise UsageError(
            f"The checkpoint {final} cannot be written: {error}. Free space or make the run "
            "directory writable and start the same command again; earlier checkpoints are "
            "untouched."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # of a failure: its space is needed
    return final


def directory_of(directory: Path, state: Mapping[str, Any]) -> Path:
    """Where the checkpoint with this state lies."""
    return directory / f"step_{int(state['step']):08d}"


def load_newest(directory: Path) -> tuple[Checkpoint, Path] | None:
    """The newest valid checkpoint and its directory; None if there is none at all.

    Raises:
        IntegrityError: checkpoints are there, but none is valid.
    """
    faults = []
    for candidate in candidates(directory):
        found = problems(candidate)
        if not found:
            return _read(candidate), candidate
        faults.append(f"{candidate.name}: {found[0]}")
        _log.warning("Checkpoint %s is passed over: %s.", candidate, found[0])
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
        digests = dict(manifest["sha256"])
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"its {MANIFEST} cannot be read ({error})"]
    if version != FORMAT_VERSION:
        return [f"its format is version {version}, this program reads {FORMAT_VERSION}"]
    found = []
    for name, digest in sorted(digests.items()):
        path = checkpoint / name
        try:
            if not path.is_file():
                found.append(f"{name} is missing")
            elif file_digest(path) != digest:
                found.append(f"{name} does not match its SHA-256")
        except OSError as error:
            found.append(f"{name} cannot be read ({error})")
    return found


def _write(target: Path, checkpoint: Checkpoint) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    digests = {}
    for name, tensors in checkpoint.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[name] = write_tensors(path, tensors)
    for name, content in checkpoint.blobs.items():
        (target / name).write_bytes(content)
    (target / "state.json").write_bytes(to_json(checkpoint.state))
    for name in (*checkpoint.blobs, "state.json"):
        digests[name] = file_digest(target / name)
    manifest = {"format_version": FORMAT_VERSION, "sha256": digests}
    (target / MANIFEST).write_bytes(to_json(manifest))
    (target / COMPLETE).touch()
    for path in [*target.rglob("*"), target]:
        sync(path)


def _read(checkpoint: Path) -> Checkpoint:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    state = json.loads((checkpoint / "state.json").read_text())
    files = {
        name: load_file(checkpoint / name)
        for name in manifest["sha256"]
        if name.endswith(".safetensors") and not name.startswith(_MEMORY)
    }
    return Checkpoint(state=state, files=files)


def candidates(directory: Path) -> list[Path]:
    """Checkpoint directories below ``directory``, newest first."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def _prune(directory: Path, newest: Path, keep: int) -> None:
    """Keep ``newest``, those before it, and what claims a later step unless it is damaged."""
    there = candidates(directory)
    later = [path for path in there if path.name > newest.name and problems(path)]
    earlier = [path for path in there if path.name < newest.name]
    for path in later + earlier[keep - 1 :]:
        # Half of it, should this be killed, is a leftover and no damaged checkpoint.
        shutil.rmtree(path.rename(directory / f".{path.name}.{os.getpid()}.tmp"))


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
