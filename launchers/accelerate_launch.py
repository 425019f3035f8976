"""``accelerate launch`` as a scheduler needs it: saves before it ends, and says how it ended.

By itself the launcher kills its processes 30 seconds after a SIGTERM, whether they have saved or
not, and its exit code is 1 whatever theirs is. This one hands SIGTERM on as SIGUSR1, at which the
program saves and exits, and ends with the exit code of the processes:

    python launchers/accelerate_launch.py launch [options of accelerate launch] -m cmkd_scale ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Collection
from types import FrameType

import psutil

AGAIN_SECONDS = 5
"""Processes that are still starting ignore the signal, so it is sent until all have ended."""

EXIT_FAULT = 1
TELLING = (42, 2, 138)
"""Exit codes that say why a run has ended, the gravest first; others only follow from these."""


def hand_on(number: int, frame: FrameType | None) -> None:
    """Send SIGUSR1 to every process below this one, now and again."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)
    signal.alarm(AGAIN_SECONDS)


def exit_code(codes: Collection[int]) -> int:
    """The one that stands for those of several processes."""
    return next((code for code in TELLING if code in codes), EXIT_FAULT)


def main() -> None:
    """Run Accelerate's command line with the arguments of this program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited by workers, which would die of it
    signal.signal(signal.SIGALRM, hand_on)
    signal.signal(signal.SIGTERM, hand_on)
    # torchrun, which Accelerate calls, takes its options from here, too: SIGTERM is ours.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    # Late: a signal that comes while these are loaded is handed on, too.
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        accelerate()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(exit_code([failure.exitcode for failure in error.failures.values()]))


if __name__ == "__main__":
    main()
