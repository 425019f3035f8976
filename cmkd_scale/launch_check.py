"""Refuses a launch whose world is not what it seems, before it trains something else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError


def check_world(seen_by_trainer: int, configured: int | None) -> None:
    """Refuse a launch whose world is not what it seems.

    Three launches silently train something else than was asked for: ``accelerate launch
    --cpu --num_processes 2`` starts one process; ``--multi_gpu`` on a CPU without
    ``ACCELERATE_USE_CPU`` starts two independent trainings; DeepSpeed on a CPU without the
    gloo backend makes every rank believe that it is alone.

    Args:
        seen_by_trainer: number of processes that the trainer (Accelerate) counts.
        configured: ``run.world_size`` of the config, or None if not set.

    Raises:
        UsageError: naming the numbers that disagree and launch lines that work.
    """
    claims = {
        "processes in the trainer": seen_by_trainer,
        "processes in the process group": distributed.world_size(),
    }
    if "WORLD_SIZE" in os.environ:
        claims["WORLD_SIZE set by the launcher"] = int(os.environ["WORLD_SIZE"])
    if configured is not None:
        claims["run.world_size in the config"] = configured
    asked = _processes_asked_of_accelerate()
    if asked is not None and "WORLD_SIZE" not in os.environ:
        claims["num_processes given to accelerate launch"] = asked
    if len(set(claims.values())) > 1:
        stated = ", ".join(f"{name}: {value}" for name, value in claims.items())
        raise UsageError(
            f"This launch is not what it seems ({stated}); it would train something else than "
            "was asked for. On CPUs launch with `ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N --num_machines 1 --mixed_precision no "
            "--dynamo_backend no -m cmkd_scale ...` or `ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node N -m cmkd_scale ...`, and keep run.world_size equal to N or unset."
        )


def _processes_asked_of_accelerate() -> int | None:
    """The ``num_processes`` that our parent was given, if that is accelerate launch.

    The simple launcher drops the number without a trace in the environment, so its command
    line is the only witness.
    """
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    return processes_on_command_line(command)


def processes_on_command_line(command: Sequence[str]) -> int | None:
    """Read ``num_processes`` out of an ``accelerate launch`` command line or its config file.

    Returns None when the command is something else or does not give a number.
    """
    names = [os.path.basename(word) for word in command[:4]]
    if not any(name.startswith("accelerate") for name in names) or "launch" not in command[:5]:
        return None
    given = _option(command, "num_processes")
    if given is not None:
        return int(given) if given.isdigit() else None
    file = _option(command, "config_file")
    try:
        settings = yaml.safe_load(Path(file).read_text()) if file else None
    except (OSError, yaml.YAMLError):
        return None  # accelerate has complained about it already
    found = settings.get("num_processes") if isinstance(settings, dict) else None
    return found if isinstance(found, int) else None


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, with dashes or underscores."""
    for position, word in enumerate(command):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value or (command[position + 1] if position + 1 < len(command) else "")
    return None
