"""What ``plan.py`` runs in processes of their own: a stage, or the measuring of a link."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale import distributed
from cmkd_scale.config import load_config
from cmkd_scale.operations.doctor_ranks import collectives
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from cmkd_scale.training.engine import Engine

_TINY_SUMS = 50
_PRODUCTS = 60


def run(stage: str, config: Path) -> dict[str, Any]:
    """Train, and say how long this process has lived and how large it was at most."""
    {"student": student, "teacher": teacher}[stage](load_config(config), console=False)
    return {
        "seconds": time.time() - psutil.Process().create_time(),
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def busy() -> float:
    """Seconds that some computing takes."""
    matrix = torch.ones(512, 512)
    begun = time.perf_counter()
    for _ in range(_PRODUCTS):
        matrix = (matrix @ matrix).clamp(max=1.0)
    return time.perf_counter() - begun


def link() -> dict[str, Any]:
    """Bytes a second between ranks, seconds of a message, and what ranks take from each other."""
    engine = Engine()
    _, speed = collectives(engine.device)
    busy()
    alone = busy() if distributed.is_main() else 0.0
    distributed.barrier()
    together = busy()
    alone, together = distributed.all_reduce_sum(torch.tensor([alone, together])).tolist()
    number = torch.zeros(1)
    distributed.barrier()
    begun = time.perf_counter()
    for _ in range(_TINY_SUMS):
        distributed.all_reduce_sum(number)
    hops = 2 * (distributed.world_size() - 1)
    return {
        "bytes_per_second": speed,
        "device_speed": min(1.0, alone * distributed.world_size() / together),
        "latency_seconds": (time.perf_counter() - begun) / _TINY_SUMS / hops,
    }


def main() -> None:
    """``link OUT`` or ``STAGE OUT CONFIG``: a file for each rank, OUT with its number."""
    kind, out, *config = sys.argv[1:]
    found = link() if kind == "link" else run(kind, Path(config[0]))
    Path(f"{out}.{distributed.rank()}").write_text(json.dumps(found))
    distributed.leave()
    distributed.end(0)


if __name__ == "__main__":
    main()
