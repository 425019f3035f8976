"""What ``cmkd doctor`` compares between ranks: versions, clocks, the run's directory, sums."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.operations.doctor_findings import Finding
from cmkd_scale.stages.runs import versions

_CLOCK_SECONDS = 2.0  # apart; Prometheus and logs of several machines are read side by side
_NUMBERS = 4 * 2**20  # 16 MiB, as large as the buckets that gradients travel in
_ROUNDS = 3
_SEEN_SECONDS = 5.0  # that a file system may take to show a file to other machines


def differing(by_rank: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Versions and configuration are those of rank 0.

    Args:
        by_rank: what each has, by name.
    """
    findings = []
    for name, first in by_rank[0].items():
        others = {
            rank: values.get(name, "none")
            for rank, values in enumerate(by_rank)
            if values.get(name) != first
        }
        if others:
            listing = ", ".join(f"{value} on rank {rank}" for rank, value in others.items())
            findings.append(
                Finding(
                    "versions",
                    "blocker",
                    f"Ranks differ in {name}: {first} on rank 0, {listing}.",
                    "Give all machines the same image or environment, config and overrides.",
                )
            )
    text = ", ".join(f"{name} {value}" for name, value in by_rank[0].items() if "conf" not in name)
    return findings or [Finding("versions", "ok", text)]


def same_versions(config: Config, device: str) -> list[Finding]:
    """``differing`` over all ranks; a collective call."""
    mine = {**versions(), "device": device, "configuration": config.digest()[:12]}
    return differing([json.loads(text) for text in distributed.gather_texts(json.dumps(mine))])


def apart(clocks: Sequence[float]) -> list[Finding]:
    """The clocks of all ranks agree.

    Args:
        clocks: seconds of each rank, read at the same time.
    """
    ahead = max(range(len(clocks)), key=clocks.__getitem__)
    behind = min(range(len(clocks)), key=clocks.__getitem__)
    difference = clocks[ahead] - clocks[behind]
    if difference <= _CLOCK_SECONDS:
        return [Finding("clocks", "ok", f"at most {difference:.2f} s apart")]
    return [
        Finding(
            "clocks",
            "warning",
            f"The clock of rank {ahead} is {difference:.0f} s ahead of that of rank {behind}: "
            "alerts on silent ranks, deadlines and signed requests to object stores go by it.",
            "Let NTP or chrony set the clocks of all machines.",
        )
    ]


def same_clock() -> list[Finding]:
    """``apart`` over all ranks; a collective call."""
    distributed.barrier()
    milliseconds = distributed.gather_integers(round(1000 * time.time()))
    return apart([value / 1000 for value in milliseconds])


def summed(values: Sequence[float], world_size: int) -> list[Finding]:
    """What the sum over ranks of their numbers, counted from 1, should be."""
    wanted = world_size * (world_size + 1) / 2
    wrong = [value for value in values if value != wanted]
    if not wrong:
        return []
    return [
        Finding(
            "collectives",
            "blocker",
            f"A sum over all ranks is wrong: {wrong[0]:g} instead of {wanted:g}, in {len(wrong)} "
            f"of {len(values)} numbers.",
            "Replace the machine or its network card; leave it out of the launch until then.",
        )
    ]


def collectives(device: torch.device) -> tuple[list[Finding], float | None]:
    """Sums are right, and how fast; a collective call.

    Returns:
        Findings, and bytes a second that each rank sends in a ring; None on one rank.
    """
    world = distributed.world_size()
    if world == 1:
        return [], None
    seconds = []
    for _ in range(_ROUNDS):
        mine = torch.full((_NUMBERS,), distributed.rank() + 1.0, device=device)
        distributed.barrier()
        begun = time.perf_counter()
        total = distributed.all_reduce_sum(mine)
        ends = total[[0, -1]].tolist()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    slowest = max(distributed.gather_integers(round(1e9 * min(seconds)))) / 1e9
    speed = 2 * (world - 1) / world * 4 * _NUMBERS / slowest
    found = summed([*ends, float(total.min()), float(total.max())], world)
    return found or [Finding("collectives", "ok", "sums are right")], speed


def existing(path: Path) -> Path:
    """The nearest directory at or above a path that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def directory(path: Path, *, wait_seconds: float = _SEEN_SECONDS) -> list[Finding]:
    """Rank 0 may write where the run will be, and all ranks see it; a collective call."""
    place = existing(path)
    number = secrets.randbelow(2**60) if distributed.is_main() else 0
    problem = _write(place, number) if distributed.is_main() else ""
    number = distributed.gather_integers(-1 if problem else number)[0]
    findings = []
    if problem:
        findings.append(
            Finding(
                "run directory",
                "blocker",
                f"{path} cannot be written: {problem}.",
                "Choose another with run.dir=DIR, or make it writable.",
            )
        )
    elif number >= 0 and not _sees(place, number, wait_seconds):
        findings.append(
            Finding(
                "run directory",
                "blocker",
                f"{path} is not the directory that rank 0 writes into: what it wrote to {place} is "
                "not there.",
                "Put run.dir on a file system that all machines share.",
            )
        )
    distributed.barrier()
    if distributed.is_main():
        with suppress(OSError):
            _token(place, number).unlink(missing_ok=True)
    return findings or [Finding("run directory", "ok", f"{path} can be written")]


def _token(place: Path, number: int) -> Path:
    return place / f".cmkd-doctor-{number}"


def _write(place: Path, number: int) -> str:
    """What keeps a file from being written, or nothing."""
    if not place.is_dir():
        return f"{place} is no directory"
    try:
        _token(place, number).write_text("of cmkd doctor; may be removed\n")
    except OSError as error:
        return str(error.strerror)
    return ""


def _sees(place: Path, number: int, wait_seconds: float) -> bool:
    ends = time.monotonic() + wait_seconds
    while not _token(place, number).exists():
        if time.monotonic() >= ends:
            return False
        time.sleep(0.1)
    return True
