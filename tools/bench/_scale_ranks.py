"""The same global batch on more ranks, for ``scale.py``: time, bytes, and the same potentials."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.training.targets import MemoryTargets
from tools.bench._bench import Rows
from tools.bench._scale_alignment import MASKED, Alignment, in_units
from tools.bench._scale_memory import Features, synthetic_memory
from tools.bench._step_variants import Setting

FOLLOWED_STEPS = 20
_RATE = 0.5  # of the student that follows


def work(setting: Setting, rounds: int, file: Path) -> NoReturn:
    """What each rank does, to its end; rank 0 writes the table and the potentials."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "rows": time_and_bytes(setting, rounds),
        "potentials": followed(setting).tolist(),
    }
    if distributed.is_main():
        file.write_text(json.dumps(found))
    distributed.leave()
    distributed.end(0)


def time_and_bytes(setting: Setting, rounds: int) -> Rows:
    """Of a rank's part of the batch, by size of memory; a collective call."""
    part = dataclasses.replace(setting, batch=setting.batch // distributed.world_size())
    features = Features.of(part.classes, part.dim)
    alignments = {
        size_name(size): Alignment(
            features, synthetic_memory(features, size // part.classes), MASKED, batch=part.batch
        )
        for size in part.sizes
    }
    rows = in_units(part, alignments, rounds)
    gradient = gradient_bytes(part)
    for name, alignment in alignments.items():
        rows[name]["bytes"] = alignment.bytes_on_wire
        rows[name]["bytes_of_gradients"] = alignment.bytes_on_wire / max(gradient, 1.0)
    for row in rows.values():
        worst = distributed.gather_rows(torch.tensor([list(row.values())], dtype=torch.float64))
        row.update(zip(row, worst.amax(0).tolist(), strict=True))
    rows["ce_ls"]["gradient_bytes"] = gradient
    return rows


def gradient_bytes(setting: Setting) -> float:
    """What a rank sends of the student's gradients in a step, float32, by the ring's formula."""
    ranks = distributed.world_size()
    parameters = setting.model(setting.student_shape).parameters()
    return 4 * sum(values.numel() for values in parameters) * 2 * (ranks - 1) / ranks


def followed(setting: Setting) -> torch.Tensor:
    """[J] potentials after a linear student has followed the smallest memory; a collective call.

    Each rank takes every W-th sample. The student moves by the potentials and they by it, so
    that a rank that saw something else would end elsewhere.
    """
    features = Features.of(setting.classes, setting.dim)
    memory = synthetic_memory(features, setting.sizes[0] // setting.classes)
    needs = frozenset({"transported"})
    targets = MemoryTargets(memory, steps=FOLLOWED_STEPS, options=MASKED, needs=needs)
    student = torch.eye(setting.dim).requires_grad_()
    mine = slice(distributed.rank(), None, distributed.world_size())
    for step in range(FOLLOWED_STEPS):
        inputs, labels = (part[mine] for part in features.student(setting.batch, step))
        values, outgoing = targets(inputs @ student, labels, step)
        exchange = targets.start([outgoing])
        cost = values["transported"]
        assert isinstance(cost, torch.Tensor)
        (gradient,) = torch.autograd.grad(cost.mean(), student)
        distributed.all_reduce_sum(gradient)
        with torch.no_grad():
            student -= _RATE / distributed.world_size() * gradient
        targets.finish(exchange, step)
    return targets.potentials.value


def size_name(prototypes: int) -> str:
    """Name of the row of a memory."""
    return f"{prototypes:,} prototypes"


def launch(ranks: int, script: Path, *, quick: bool) -> dict[str, Any]:
    """What ``ranks`` ranks of ``script`` found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as directory:
        file = Path(directory) / "found.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            *(str(script), "--json", str(file), *(["--quick"] if quick else [])),
        ]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        found: dict[str, Any] = json.loads(file.read_text())
    return found
