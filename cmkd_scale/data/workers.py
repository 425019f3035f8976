"""Processes that decode ahead of training.

They are forked from a server that has imported this package once and holds nothing else, so
they start in milliseconds, share its memory, and know nothing of the trainer's threads,
which a fork of the trainer itself could deadlock on. Signals to the whole group leave them
alone, since the trainer still needs its data to reach a checkpoint; they die with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


def answers(
    dataset: Dataset[_Answer], requests: Iterable[_Request], workers: int
) -> Iterator[_Answer]:
    """``dataset[request]`` for each request, in order.

    Args:
        dataset: is sent to each worker once.
        requests: read a little ahead of the answers.
        workers: processes; 0 answers here.
    """
    if workers == 0:
        for request in requests:
            yield dataset[request]
        return
    with warnings.catch_warnings():
        # Whether more workers than cores make sense is for the configuration to say.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        delivered = iter(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=requests,
                num_workers=workers,
                collate_fn=_as_it_is,
                multiprocessing_context=context(),
                worker_init_fn=_start,
            )
        )
    yield from delivered


def context() -> ForkServerContext:
    """Starts processes like those: for the initialiser of each, see ``bind_to_parent``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["cmkd_scale.data.loader"])
    # The server inherits the mask, and its workers from it; ours is restored at once, and
    # what arrived in between is delivered then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return found


def _as_it_is(answer: _Answer) -> _Answer:
    return answer


def _start(worker: int) -> None:
    bind_to_parent()


def bind_to_parent() -> None:
    """Outlive signals, but not the parent."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # The server ends when the trainer does, and this worker with the server.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it ended before the line above
            os._exit(1)
