"""Processes that decode ahead of training.

They are forked from a server that has imported this package once and holds nothing else, so
they start in some 65 ms (the server itself in 3 s), share its memory, and know nothing of the
trainer's threads, which a fork of the trainer itself could deadlock on. Signals to the whole
group leave them alone, since the trainer still needs its data to reach a checkpoint; they die
with it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import TypeVar

import psutil
from torch.utils.data import DataLoader, Dataset

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}

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
    _end_workers_at_exit()
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
                worker_init_fn=functools.partial(_start, os.getpid()),
            )
        )
    yield from delivered


def context() -> ForkServerContext:
    """Starts processes like those: for the initialiser of each, see ``bind_to``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["cmkd_scale.data.loader"])
    # Starting the tracker, which the server would do, unblocks signals on its way.
    resource_tracker.ensure_running()
    # The server inherits the mask, and its workers from it; ours is restored at once, and
    # what arrived in between is delivered then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return found


@functools.cache
def _end_workers_at_exit() -> None:
    """Have them killed before multiprocessing asks them to end, and waits: they ignore that."""

    def end() -> None:
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(end)


def _as_it_is(answer: _Answer) -> _Answer:
    return answer


def _start(trainer: int, worker: int) -> None:
    bind_to(trainer)


def bind_to(trainer: int) -> None:
    """Make this process outlive signals, but not the process ``trainer``.

    Its parent is the server, which lives as long as one of its children does, so what tells
    usual children that their parent is gone says nothing here.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # what was imported is never garbage; looking for some in it would copy its pages
    threading.Thread(target=_end_with, args=(trainer,), name="bind", daemon=True).start()


def _end_with(process: int) -> None:
    try:
        ended = os.pidfd_open(process)  # readable when it has
        select.select([ended], [], [])
    except (OSError, AttributeError):  # gone already, or a system without these
        while psutil.pid_exists(process):
            time.sleep(1.0)
    os._exit(1)
