"""Rank, world size and the few collectives of the project; silent with no process group.

The only importer of ``torch.distributed``. Every function is correct in a program that
was started without a launcher: rank 0 of 1, reductions return their input.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from cmkd_scale.errors import CmkdError

_STORE_SECONDS = 5.0  # that a rank waits for the store of another


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def limit_waits(seconds: float) -> None:
    """Let processes give each other up after ``seconds`` in every group that there is.

    Libraries make groups of their own (DeepSpeed, one of all ranks for the gradients), and these
    have torch's limits: 10 minutes with NCCL and 30 with gloo.
    """
    if is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def leave() -> None:
    """Leave the process group, if there is one; the last thing that a program does.

    A process that ends inside of it may be aborted by gloo's threads (SIGABRT, "terminate called
    without an active exception"), and its exit code is lost.
    """
    if is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End the program at once, after what is registered for its exit; ``sys.exit`` elsewhere.

    The last line of any program of several ranks, after ``leave``: the interpreter's own end may
    still meet gloo's threads and be aborted by them (one process in some 150 on a busy machine;
    each one with the groups that DeepSpeed holds).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_SIGNS_OF_A_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Connection refused",
    "Application timeout caused pair closure",
    "ncclRemoteError",
    "ncclSystemError",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
)
"""In what gloo and NCCL say."""


def lost_peer(error: BaseException) -> bool:
    """Whether a collective call has failed because another process is gone or silent."""
    if isinstance(error, dist.DistNetworkError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_A_LOST_PEER)


def barrier() -> None:
    """Wait for all ranks."""
    if is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over ranks in place and return it."""
    if is_initialized():
        wire = _on_wire(tensor)
        dist.all_reduce(wire)
        if wire is not tensor:
            tensor.copy_(wire)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate tensors [n_r, ...] of all ranks in rank order; n_r may differ and be 0.

    Rows are padded to the longest rank's count and sent as one contiguous tensor: object
    collectives would pickle them.
    """
    if world_size() == 1:
        return rows
    counts = gather_integers(len(rows))
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = _all_gather(padded)
    whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return whole.to(rows.device)


def exchange_rows(rows: Tensor, owner: Tensor) -> Tensor:
    """Send each row to the rank that owns it; a collective call.

    Args:
        rows: [n, ...] of this rank, contiguous or not; n may differ and be 0.
        owner: [n] int64 rank that each row goes to.

    Returns:
        The rows of all ranks that this rank owns, in the order of ranks, then of their rows.
    """
    if world_size() == 1:
        return rows
    counts = torch.bincount(owner, minlength=world_size())
    arriving = torch.stack(_all_gather(counts))[:, rank()].tolist()
    leaving = _on_wire(rows[torch.argsort(owner, stable=True)])
    arrived = leaving.new_empty((sum(arriving), *rows.shape[1:]))
    dist.all_to_all_single(arrived, leaving, arriving, counts.tolist())
    return arrived.to(rows.device)


class Pending:
    """A collective under way, which began before work that it need not wait for."""

    def __init__(
        self, result: Tensor, work: dist.Work | None = None, device: torch.device | None = None
    ) -> None:
        """Take what the collective writes into; without ``work`` it is there already.

        ``device`` is where the result is wanted; None leaves it where it is.
        """
        self._result = result
        self._work = work
        self._device = device or result.device
        self.bytes_on_wire = 0.0
        """What this rank sends, by the formula of the ring algorithm."""

    def wait(self) -> Tensor:
        """The result, once it is there, on the device of the tensor that was given."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            # NCCL moves device tensors only, so that of a CPU tensor lies on a GPU.
            self._result = self._result.to(self._device)
        return self._result


def start_all_reduce_sum(tensor: Tensor) -> Pending:
    """Begin to sum ``tensor`` over ranks; it must not be touched before ``wait``.

    The sum is what ``wait`` returns, on the tensor's device; whether the tensor itself holds it,
    too, depends on the backend. A ring sends ``2 (W - 1) / W`` times the tensor.
    """
    if world_size() == 1 or tensor.numel() == 0:
        return Pending(tensor)
    wire = _on_wire(tensor)
    pending = Pending(wire, dist.all_reduce(wire, async_op=True), tensor.device)
    ranks = world_size()
    pending.bytes_on_wire = 2 * (ranks - 1) / ranks * wire.numel() * wire.element_size()
    return pending


def start_gather(tensor: Tensor) -> Pending:
    """Begin to gather tensors of one shape: the result is [W, ...], in the order of ranks.

    It is on the tensor's device. A ring sends ``W - 1`` times the tensor.
    """
    if world_size() == 1:
        return Pending(tensor.unsqueeze(0))
    wire = _on_wire(tensor)
    gathered = wire.new_empty((world_size(), *wire.shape))
    work = dist.all_gather(list(gathered.unbind(0)), wire, async_op=True)
    pending = Pending(gathered, work, tensor.device)
    pending.bytes_on_wire = (world_size() - 1) * wire.numel() * wire.element_size()
    return pending


def gather_integers(value: int) -> list[int]:
    """The ``value`` of each rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    mine = torch.tensor([value], dtype=torch.int64)
    return [int(part.item()) for part in _all_gather(mine)]


def gather_texts(text: str) -> list[str]:
    """The ``text`` of each rank, in rank order; a collective call."""
    content = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = gather_integers(len(content))
    whole = bytes(gather_rows(content).tolist())
    ends = [sum(lengths[: rank + 1]) for rank in range(len(lengths))]
    return [whole[end - length : end].decode() for end, length in zip(ends, lengths, strict=True)]


def same_digest(digest: str) -> bool:
    """Whether all ranks have this SHA-256, in hexadecimal; a collective call."""
    # The first 15 digits fit the integers that ranks exchange.
    return len(set(gather_integers(int(digest[:15], 16)))) == 1


def _all_gather(tensor: Tensor) -> list[Tensor]:
    wire = _on_wire(tensor)
    gathered = [torch.empty_like(wire) for _ in range(world_size())]
    dist.all_gather(gathered, wire)
    return gathered


def _on_wire(tensor: Tensor) -> Tensor:
    """``tensor`` where the backend can send it: NCCL moves device tensors only."""
    return tensor.contiguous().cuda() if dist.get_backend() == "nccl" else tensor.contiguous()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank: the same answer on every rank."""
    return any(gather_integers(int(flag)))


def run_on_main(work: Callable[[], object]) -> None:
    """Do ``work`` on rank 0 while the others wait; its failure ends all ranks alike.

    Raises:
        CmkdError: what ``work`` raised on rank 0; elsewhere one with the same exit code.
    """
    run_together(work if is_main() else lambda: None)


def run_together(work: Callable[[], object]) -> None:
    """Do ``work`` on every rank; a failure of any ends all alike, so none waits for it in vain.

    A rank that fails is waited for at the end of ``work``: collectives in it are allowed where
    none can fail before one of them.

    Raises:
        CmkdError: what ``work`` raised here; where it raised nothing, one with the exit code of
            the first rank that failed.
    """
    failure = None
    try:
        work()
    except CmkdError as error:
        failure = error
    codes = gather_integers(failure.exit_code if failure else 0)
    if failure is not None:
        raise failure
    failed = next((number for number, code in enumerate(codes) if code), None)
    if failed is not None:
        stopped = CmkdError(f"stopped, because rank {failed} did; its message says why.")
        stopped.exit_code = codes[failed]
        raise stopped


class Store:
    """Small texts that ranks leave for each other without a collective call."""

    def __init__(self, store: Any) -> None:
        """Take a store that all ranks have opened."""
        self._store = store

    def put(self, key: str, text: str) -> None:
        """Leave ``text``; RuntimeError if the store's host is gone."""
        self._store.set(key, text)

    def get(self, key: str) -> str | None:
        """What was left, if anything; RuntimeError if the store's host is gone."""
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None


def open_store() -> Store | None:
    """A store that lives as long as rank 0, or None with one process; a collective call."""
    if world_size() == 1:
        return None
    host = _tcp_store(0) if is_main() else None
    port = max(gather_integers(host.port if host is not None else 0))
    return Store(host if host is not None else _tcp_store(port))


def _tcp_store(port: int) -> Any:
    """The store at a port of rank 0's machine; port 0 makes one, on rank 0."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port,
        is_master=port == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=_STORE_SECONDS),
    )
