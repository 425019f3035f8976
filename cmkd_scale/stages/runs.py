"""The run directory: who may write into it, its results, what it was made with."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from cmkd_scale import __version__, distributed
from cmkd_scale.config import Config, make_config, save_config
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json, to_json, write_atomically

_FIRST = {"config.yaml", "env.json", "run_id", "labels.json", "backbone"}
"""What is written before anything of a run is computed."""
_locks: dict[Path, int] = {}
"""Open directories that this process writes into; locked until it ends."""


def open_run(config: Config, stage: str) -> Path:
    """Make or take up the run directory; a collective call.

    Raises:
        UsageError: ``run.dir`` is unset, not writable, in use by another process, or holds a
            run of another stage or another configuration.
        IntegrityError: what it holds is damaged.
    """
    config.require("run.dir")
    directory = Path(str(config.run.dir))

    def prepare() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock(directory, "run.dir")
            check_same_run(directory, config, stage)
            write_atomically(directory / "env.json", to_json(_environment(stage)))
            save_config(config, directory / "config.yaml")
        except OSError as error:
            raise UsageError(
                f"The run directory {directory} cannot be written: {error}. Choose another with "
                "run.dir=DIR or make it writable."
            ) from None

    distributed.run_on_main(prepare)
    return directory


def read_config(directory: Path) -> Config:
    """The resolved configuration of a run.

    Raises:
        IntegrityError: it cannot be read.
    """
    file = directory / "config.yaml"
    try:
        return make_config(yaml.safe_load(file.read_text()), source=str(file))
    except (OSError, ValueError, TypeError, yaml.YAMLError, UsageError) as error:
        raise IntegrityError(
            f"{file} is damaged ({' '.join(str(error).split())}); restore it from a copy, or use "
            "another run.dir."
        ) from None


def write_results(
    directory: Path,
    *,
    stage: str,
    config: Config,
    metrics: Mapping[str, Any],
    began: float,
    name: str = "results.json",
    **more: Any,
) -> dict[str, Any]:
    """Write ``results.json`` on rank 0 and return its content on all.

    Args:
        directory: the run directory.
        stage: the verb.
        config: resolved configuration.
        metrics: e.g. ``test/accuracy``.
        began: ``time.perf_counter()`` at the start of the stage.
        name: file name.
        more: further top-level keys.
    """
    results = {
        "stage": stage,
        "seed": config.run.seed,
        "metrics": dict(metrics),
        "config_digest": config.digest(),
        "wall_seconds": round(time.perf_counter() - began, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        **more,
    }
    distributed.run_on_main(lambda: write_json(directory / name, results))
    return results


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically.

    Raises:
        UsageError: it cannot be written.
    """
    write_file(path, to_json(value))


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run atomically.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}. Free space and run again.") from None


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    found = {"cmkd_scale": __version__, "python": platform.python_version()}
    for package in ("torch", "accelerate", "transformers", "numpy"):
        found[package] = metadata.version(package)
    return found


def lock(directory: Path, option: str) -> None:
    """Keep other processes from writing into the same directory until this one ends.

    Raises:
        UsageError: one is writing; ``option`` is what names the directory.
    """
    key = directory.resolve()
    if key in _locks:
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(
            f"Another process is writing into {directory}; wait for it, or choose another {option}."
        ) from None
    _locks[key] = handle


def _environment(stage: str) -> dict[str, Any]:
    return {
        "stage": stage,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "command": sys.argv,
        "world_size": distributed.world_size(),
        "versions": versions(),
    }


def check_same_run(directory: Path, config: Config, stage: str) -> None:
    """Refuse to continue a run under another stage or configuration.

    A start that was refused before anything was computed is no run yet.
    """
    if not (directory / "config.yaml").exists() or not _has_begun(directory):
        return
    before = read_config(directory)
    stage_before = read_json(directory / "env.json").get("stage")
    remedy = "Use another run.dir, or remove that directory to start again."
    if stage_before != stage:
        raise UsageError(f"{directory} is a run of `cmkd {stage_before}`. {remedy}")
    if before.digest() != config.digest():
        changed = ", ".join(_differences(before.model_dump(), config.model_dump())) or "options"
        raise UsageError(
            f"{directory} holds a run with another configuration (different: {changed}), and "
            f"continuing it would mix two runs. {remedy}"
        )


def _has_begun(directory: Path) -> bool:
    """Whether there is a file of more than a start."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return any(path.relative_to(directory).parts[0] not in _FIRST for path in files)


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, f"{prefix}{key}.")
        elif value != old:
            found.append(f"{prefix}{key}")
    return found
