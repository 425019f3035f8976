"""Run by several ranks: ``hangs.py DIRECTORY RANK PHASE``; that rank never comes out of PHASE.

PHASE ``stopped``: its whole process is stopped, its watchdog with it, as if its machine were.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist  # noqa: TID251

from cmkd_scale import distributed
from cmkd_scale.training.watchdog import Watchdog


def sleeping_rank() -> None:
    threading.Event().wait()


directory, hanging, phase = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo")
with Watchdog(1.0, directory=directory) as watchdog:
    for step in range(1000):
        for at in ("data", "forward", "backward"):
            watchdog.at(at, step)
            if distributed.rank() == hanging and step == 7 and at == phase:
                sleeping_rank()
            if distributed.rank() == hanging and (step, phase) == (7, "stopped"):
                os.kill(os.getpid(), signal.SIGSTOP)
            if at == "backward":
                distributed.all_reduce_sum(torch.ones(2))
