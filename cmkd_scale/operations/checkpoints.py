"""``cmkd checkpoint verify`` and ``info``: what a run can be continued from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json
from cmkd_scale.training.checkpoint import LATEST, candidates, problems


def verify(directory: Path) -> dict[str, Any]:
    """Read every checkpoint of a run and compare its files with their digests.

    Args:
        directory: a run, its ``checkpoints``, or one checkpoint.

    Raises:
        UsageError: there is none.
        IntegrityError: one or more are damaged; the message names them.
    """
    rows: list[dict[str, Any]] = [
        {"checkpoint": str(path), "step": _step(path), "problems": problems(path)}
        for path in _find(directory)
    ]
    bad = [row for row in rows if row["problems"]]
    if bad:
        listing = "; ".join(
            f"{Path(str(row['checkpoint'])).name}: {', '.join(row['problems'])}" for row in bad
        )
        raise IntegrityError(
            f"{len(bad)} of {len(rows)} checkpoints in {directory} are damaged ({listing}). A run "
            "continues from the newest sound one by itself; remove the damaged, or restore them "
            "from a copy."
        )
    return {"directory": str(directory), "checkpoints": rows}


def info(directory: Path) -> dict[str, Any]:
    """What each checkpoint holds; nothing is hashed.

    Args:
        directory: a run, its ``checkpoints``, or one checkpoint.

    Raises:
        UsageError: there is none.
    """
    found = _find(directory)
    latest = found[0].parent / LATEST
    return {
        "directory": str(directory),
        "latest": latest.resolve().name if latest.exists() else None,
        "checkpoints": [_row(path) for path in found],
    }


def _find(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    if directory.name.startswith("step_") or directory.name == LATEST:
        found = [directory.resolve()] if directory.is_dir() else []
    else:
        within = directory / "checkpoints"
        found = list(reversed(candidates(within if within.is_dir() else directory)))
    if not found:
        raise UsageError(
            f"{directory} holds no checkpoint; give the directory of a run, its `checkpoints`, or "
            "one of them."
        )
    return found


def _row(path: Path) -> dict[str, Any]:
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    try:
        state = read_json(path / "state.json")
        manifest = read_json(path / "manifest.json")
        with safe_open(path / "model.safetensors", framework="numpy") as file:
            names = list(file.keys())
            sizes_of = [math.prod(file.get_slice(name).get_shape()) for name in names]
    except (OSError, IntegrityError, SafetensorError) as error:
        return {"checkpoint": path.name, "bytes": sum(sizes), "unreadable": str(error)}
    return {
        "checkpoint": path.name,
        "step": state.get("step"),
        "samples_seen": state.get("samples_seen"),
        "method": state.get("method"),
        "bytes": sum(sizes),
        "files": sorted(manifest.get("sha256", {})),
        "tensors": len(names),
        "numbers": sum(sizes_of),
        "restarts": state.get("restarts", {}),
    }


def _step(path: Path) -> int:
    number = path.name.removeprefix("step_")
    return int(number) if number.isdigit() else -1
