"""What ``cmkd doctor`` estimates from a few steps: whether it fits, how long it takes, the cost."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmkd_scale.config import Config
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.data.loader import explicit_batches
from cmkd_scale.operations.doctor_findings import Finding
from cmkd_scale.operations.doctor_machine import available_memory, in_units
from cmkd_scale.operations.doctor_ranks import existing
from cmkd_scale.operations.plan_calibration import Calibration
from cmkd_scale.operations.plan_cluster import HOUR, Work
from cmkd_scale.operations.plan_memory import FLOAT, MARGIN, Sizes, advise, rank_memory
from cmkd_scale.stages.common import Trained
from cmkd_scale.stages.streams import SplitData

_STEPS_OF_PATIENCE = 10  # that a watchdog should wait at least
_PASS_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of the whole run, as it was launched."""

    parameters: int
    backend: str
    advised: str | None
    """The backend that sends least of those that fit (``BACKEND`` of the launchers)."""
    rank_bytes: int
    """Of the largest rank at its peak."""
    checkpoint_bytes: int
    step_seconds: float
    hours: float
    cost: float | None
    """Hours times the price of an hour."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def hours_of(work: Work, world_size: int) -> float:
    """From steps that were measured as they will be: with all ranks and their exchange."""
    saves = -(-work.steps // work.checkpoint_every)
    seconds = work.steps * work.compute_seconds + saves * work.stall_seconds
    batches = -(-work.evaluation_batches // world_size)
    return (seconds + work.start_seconds + batches * work.evaluation_seconds) / HOUR


def available_to_rank(device: torch.device, local_ranks: int) -> int:
    """Bytes that a rank may take where it computes, what it has already aside."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory() // local_ranks


def fits(
    sizes: Sizes, backend: str, world_size: int, available: int, *, shared: bool
) -> tuple[list[Finding], str | None]:
    """Model, optimizer and memory fit into a rank's memory; and which backend would do.

    Args:
        sizes: of the run.
        backend: that was launched.
        world_size: number of ranks.
        available: bytes of a rank, beside what the process has already.
        shared: whether these are those of the machine, which hold the host's part, too.
    """
    available += sizes.runtime_bytes if shared else sizes.context_bytes
    advised = advise(sizes, world_size, available, shared=shared)
    memory = rank_memory(sizes, backend, world_size)
    needed = memory.bytes if shared else memory.device_bytes
    text = f"{in_units(needed)} of {in_units(available)} that a rank has, with {backend}"
    if needed <= MARGIN * available:
        return [Finding("memory of a rank", "ok", text)], advised
    largest = max(memory.device, key=memory.device.__getitem__)
    remedy = (
        f"Start with BACKEND={advised}."
        if advised not in (None, backend)
        else "Use more ranks, train.activation_checkpointing=true, a larger "
        "train.gradient_accumulation_steps, or a smaller model."
    )
    found = f"{text}; the largest part are its {largest} ({in_units(memory.device[largest])})."
    return [Finding("memory of a rank", "blocker", found, remedy)], advised


def space(
    directory: Path, size: int, keep: int, there: int, *, free: int | None = None
) -> list[Finding]:
    """Checkpoints fit onto the disk.

    Args:
        directory: of the checkpoints.
        size: bytes of one.
        keep: that are kept; one more lies there while it is written.
        there: that lie there already.
        free: bytes; None asks the disk.
    """
    free = shutil.disk_usage(existing(directory)).free if free is None else free
    needed = max(1, keep + 1 - there) * size
    if needed > free:
        return [
            Finding(
                "disk",
                "blocker",
                f"{max(1, keep + 1 - there)} checkpoints of {in_units(size)} do not fit at "
                f"{directory}, which has {in_units(free)} free.",
                "Free space, choose another run.dir, or lower train.keep_checkpoints.",
            )
        ]
    return [Finding("disk", "ok", f"{in_units(needed)} of {in_units(free)} for checkpoints")]


def times(config: Config, step_seconds: float, hours: float, now: datetime) -> list[Finding]:
    """The run is through in time, and its watchdog knows how long a step takes."""
    findings = []
    watch = config.run.watchdog_seconds
    if 0 < watch < _STEPS_OF_PATIENCE * step_seconds:
        findings.append(
            Finding(
                "watchdog",
                "blocker" if watch < 2 * step_seconds else "warning",
                f"A step takes {step_seconds:.1f} s, and run.watchdog_seconds={watch:g} ends a "
                "run that does not move for so long.",
                f"Set run.watchdog_seconds to {_STEPS_OF_PATIENCE * step_seconds:.0f} or more.",
            )
        )
    deadline = config.monitor.deadline
    if deadline is not None and now + timedelta(hours=hours) > deadline:
        late = (now + timedelta(hours=hours) - deadline).total_seconds() / HOUR
        findings.append(
            Finding(
                "deadline",
                "warning",
                f"The run would take {hours:.1f} h and be through {late:.1f} h after "
                f"monitor.deadline={deadline.isoformat()}.",
                "Use more ranks, fewer train.steps, or another deadline.",
            )
        )
    return findings


def exchange(calibration: Calibration, bytes_per_second: float | None) -> list[Finding]:
    """The exchange of gradients is short beside a step."""
    if bytes_per_second is None:
        return []
    seconds = 2 * FLOAT * calibration.sizes.parameters / bytes_per_second
    text = f"{bytes_per_second / 1e9:.2f} GB/s; gradients take {seconds:.3f} s"
    if seconds <= calibration.step_seconds:
        return [Finding("network", "ok", text)]
    return [
        Finding(
            "network",
            "warning",
            f"{text}, more than the {calibration.step_seconds:.3f} s of a step.",
            "Look at the link between the machines (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), or "
            "give each rank more samples a step.",
        )
    ]


@torch.no_grad()
def pass_hours(
    trained: Trained, data: SplitData, device: torch.device, batch_size: int, world_size: int
) -> float:
    """How long the teacher's pass of ``cmkd memory`` takes, from a few of its batches.

    Raises:
        IntegrityError: samples of them cannot be read.
    """
    places = data.labelled()[: _PASS_BATCHES * batch_size]
    parts = np.array_split(places, _PASS_BATCHES)
    quarantine = Quarantine(len(places), max_bad_fraction=1.0)
    model = trained.model.to(device).eval()
    begun, read = time.perf_counter(), 0
    for left, batch in explicit_batches(
        data.reader, data.modality, parts, quarantine=quarantine, workers=data.workers
    ):
        if batch is not None:
            model(batch.inputs.to(device)).features.cpu()
            read += len(left)
    each = (time.perf_counter() - begun) / max(1, read)
    return each * len(data.labelled()) / world_size / HOUR
