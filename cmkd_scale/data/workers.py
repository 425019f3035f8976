"""Processes that decode ahead of training.

They are forked from a server that has imported this package once and holds nothing else, so
they start in some 65 ms (the server itself in 3 s), share its memory, and know nothing of the
trainer's threads, which a fork of the trainer itself could deadlock on. Signals to the whole
group leave them alone, since the trainer still needs its data to reach a checkpoint; they die
with it.

Each has a pipe of its own, so one that is killed is an end of file, at once and wherever it was.
torch's DataLoader has one queue for all: one killed while it writes there (most of the time, if
batches are larger than the pipe) leaves half a message that the trainer waits on for ever.
"""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import multiprocessing
import os
import queue
import select
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, Generic, NamedTuple, TypeVar

import psutil
import torch
from torch.utils.data import Dataset

from cmkd_scale.errors import CmkdError

_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
_AHEAD = 2  # requests that each worker has been sent and not answered
_END_SECONDS = 5.0  # that a worker has to end by itself

_pids: set[int] = set()  # of the workers of this process

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

    Raises:
        CmkdError: a worker was killed.
        RuntimeError: the data set raised what is no answer; the text has the traceback.
    """
    if workers == 0:
        for request in requests:
            yield dataset[request]
        return
    _end_workers_at_exit()
    pool = [_Worker(dataset, workers) for _ in range(workers)]
    asked: deque[_Worker[_Answer]] = deque()
    turns = zip(itertools.cycle(pool), requests, strict=False)

    def ask(times: int) -> None:
        for worker, request in itertools.islice(turns, times):
            worker.ask(request)
            asked.append(worker)

    try:
        ask(_AHEAD * workers)
        while asked:
            answer = asked.popleft().answer()
            ask(1)
            yield answer
    finally:
        for worker in pool:
            worker.dismiss()
        for worker in pool:
            worker.wait()


def alive() -> int:
    """Workers of this process that live; from any thread."""
    return sum(psutil.pid_exists(pid) for pid in tuple(_pids))


class _Failure(NamedTuple):
    """What a worker sends in the place of an answer."""

    trace: str


class _Worker(Generic[_Answer]):
    """A process that answers requests in order, and the pipe to it."""

    def __init__(self, dataset: Dataset[_Answer], of: int) -> None:
        """Start one ``of`` so many."""
        self._of = of
        processes = context()
        self._pipe, other_end = processes.Pipe()
        self._process = processes.Process(
            target=_work, args=(dataset, other_end, os.getpid()), name="decoding", daemon=True
        )
        self._process.start()
        _pids.add(self._pid)
        other_end.close()  # so that the worker alone holds it, and its death closes it

    @property
    def _pid(self) -> int:
        return self._process.pid or 0

    def ask(self, request: object) -> None:
        """Send a request; it is taken while the worker is at earlier ones.

        Raises:
            CmkdError: the worker was killed.
        """
        try:
            self._pipe.send(request)
        except OSError as error:
            raise self._lost(error) from None

    def answer(self) -> _Answer:
        """Wait for the answer to the oldest request without one.

        Raises:
            CmkdError: the worker was killed.
            RuntimeError: the data set failed.
        """
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:  # OSError: whoever has a tensor's file is gone
            raise self._lost(error) from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"A decoding worker has failed:\n{answer.trace}")
        return answer  # type: ignore[no-any-return]

    def dismiss(self) -> None:
        """Have it end when it is through with what it is at."""
        self._pipe.close()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.join(_END_SECONDS)
        self._process.kill()  # it may hang in a read; it holds nothing that must be put in order
        self._process.join()
        _pids.discard(self._pid)

    def _lost(self, error: Exception) -> Exception:
        """What to say of an ``error`` in talking to it."""
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        if code is None:  # it lives: a fault of ours
            return error
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return CmkdError(
            f"One of {self._of} processes that decode samples was killed (process "
            f"{self._process.pid}, {how}). Signal 9 most often means that the system was out of "
            "memory, signal 7 that /dev/shm was full: use fewer workers (data.workers) or a "
            "smaller data.cache_bytes, and start the same command again. A stage continues from "
            "the newest checkpoint."
        )


def _work(dataset: Dataset[Any], pipe: Connection, trainer: int) -> None:
    """What a worker does until the trainer closes its end."""
    bind_to(trainer)
    torch.set_num_threads(1)
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A full pipe must neither keep requests waiting, or both ends might write for ever, nor
    # decoding.
    threading.Thread(target=_send, args=(pipe, outbox), name="send", daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                answer = dataset[request]
            except Exception:
                answer = _Failure(traceback.format_exc())
            outbox.put(answer)


def _send(pipe: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            pipe.send(outbox.get())
    except OSError:  # the trainer has closed its end
        os._exit(0)


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
