"""The errors by which a rank learns that another one is gone, as the libraries say them."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cmkd_scale import distributed

# Two ranks meet; the second one dies or falls silent, and the first one says what it hears of it.
TWO_RANKS = """
import datetime, os, signal, sys, time
import torch
import torch.distributed as dist
from cmkd_scale import distributed

rank, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60 if what == "killed" else 2),
)
dist.barrier()
if rank == 1:
    if what == "silent":
        sys.stdin.read()  # until the first one has given up
    os.kill(os.getpid(), signal.SIGKILL)
try:
    dist.all_reduce(torch.ones(3))
except Exception as error:
    print(distributed.lost_peer(error), error, flush=True)
os._exit(0)
"""
STORE = """
import os, signal, sys
from datetime import timedelta
import torch.distributed as dist
from cmkd_scale import distributed

port, host = int(sys.argv[2]), sys.argv[1] == "1"
store = dist.TCPStore("127.0.0.1", port, 2, host, timedelta(seconds=60))
store.set(sys.argv[1], "met")
if host:
    store.get("0")
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        store.get("0")
except Exception as error:
    print(distributed.lost_peer(error), error, flush=True)
"""


def heard(script: str, what: str) -> str:
    """What rank 0 prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, rank, port, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        assert ranks[0].stdout is not None
        return ranks[0].stdout.read()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("script", "what", "words"),
    [
        (TWO_RANKS, "killed", "Connection "),  # closed or reset by peer, as it falls
        (TWO_RANKS, "silent", "Timed out waiting 2000ms"),
        (STORE, "killed", ""),
    ],
    ids=["killed", "silent", "store"],
)
def test_a_rank_that_is_gone_or_silent_is_recognised(script: str, what: str, words: str) -> None:
    said = heard(script, what)
    assert said.startswith("True ")
    assert words in said


@pytest.mark.parametrize(
    "message",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network "
        "error, NCCL version 2.27.5\nncclRemoteError: A call failed possibly due to a network "
        "error or a remote process exiting prematurely.",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, "
        "OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=10000) ran for 10009 milliseconds "
        "before timing out.",
        "NCCL communicator was aborted on rank 1.",
    ],
)
def test_what_nccl_says_is_recognised(message: str) -> None:
    assert distributed.lost_peer(RuntimeError(message))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA out of memory"),
        ValueError("Connection closed by peer"),  # no collective call raises it
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_none_of_a_lost_peer(error: BaseException) -> None:
    assert not distributed.lost_peer(error)
