"""Run by two ranks: ``cmkd``, in which one rank sends itself a signal at its n-th event.

``killed.py SIGNAL RANK N WORDS...``. Events are what a run is made of: the beginning of a step,
a batch of the teacher's pass, each flush and each renaming of a file, in whatever thread. Ranks
that a launcher has started again are left alone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from cmkd_scale.cli import program
from cmkd_scale.memory.spool import Spool
from cmkd_scale.training import loop

NUMBER, RANK, AT = getattr(signal, sys.argv[1]), sys.argv[2], int(sys.argv[3])
events = 0


def counted(real: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*arguments: Any, **more: Any) -> Any:
        global events
        events += 1
        if events == AT:
            print(f"killed at event {AT}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), NUMBER)
        return real(*arguments, **more)

    return watched


first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
if os.environ["RANK"] == RANK and first:
    loop.learning_rate_at = counted(loop.learning_rate_at)  # type: ignore[attr-defined]
    Spool.add = counted(Spool.add)  # type: ignore[method-assign]
    os.fsync = counted(os.fsync)
    os.rename = counted(os.rename)
program(sys.argv[4:])
