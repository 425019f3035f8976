"""Rank, world size and the few collectives of the project; silent with no process group.

The only importer of ``torch.distributed``. Every function is correct in a program that
was started without a launcher: rank 0 of 1, reductions return their input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from cmkd_scale.errors import CmkdError, UsageError


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


def leave() -> None:
    """Leave the process group, if there is one; the last thing that a program does.

    A process that ends inside of it may be aborted by gloo's threads (SIGABRT, "terminate called
    without an active exception"), and its exit code is lost.
    """
    if is_initialized():
        dist.destroy_process_group()


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


def check_world(seen_by_trainer: int, configured: int | None) -> None:
    """Refuse a launch whose world is not what it seems.

    Three launches silently train something else than was asked for: ``accelerate launch
    --cpu --num_processes 2`` starts one process; ``--multi_gpu`` on a CPU without
    ``ACCELERATE_USE_CPU`` starts two independent trainings; DeepSpeed on a CPU without the
    gloo backend makes every rank believe that it is alone.

    Args:
        seen_by_trainer: number of processes that the trainer (Accelerate) counts.
        configured: ``run.world_size`` of the config, or None if not set.

    Raises:
        UsageError: naming the numbers that disagree and launch lines that work.
    """
    claims = {
        "processes in the trainer": seen_by_trainer,
        "processes in the process group": world_size(),
    }
    if "WORLD_SIZE" in os.environ:
        claims["WORLD_SIZE set by the launcher"] = int(os.environ["WORLD_SIZE"])
    if configured is not None:
        claims["run.world_size in the config"] = configured
    asked = _processes_asked_of_accelerate()
    if asked is not None and "WORLD_SIZE" not in os.environ:
        claims["num_processes given to accelerate launch"] = asked
    if len(set(claims.values())) > 1:
        stated = ", ".join(f"{name}: {value}" for name, value in claims.items())
        raise UsageError(
            f"This launch is not what it seems ({stated}); it would train something else than "
            "was asked for. On CPUs launch with `ACCELERATE_USE_CPU=true accelerate launch "
            "--multi_gpu --num_processes N --num_machines 1 --mixed_precision no "
            "--dynamo_backend no -m cmkd_scale ...` or `ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node N -m cmkd_scale ...`, and keep run.world_size equal to N or unset."
        )


def _processes_asked_of_accelerate() -> int | None:
    """The ``num_processes`` that our parent was given, if that is accelerate launch.

    The simple launcher drops the number without a trace in the environment, so its command
    line is the only witness.
    """
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    return processes_on_command_line(command)


def processes_on_command_line(command: Sequence[str]) -> int | None:
    """Read ``num_processes`` out of an ``accelerate launch`` command line or its config file.

    Returns None when the command is something else or does not give a number.
    """
    names = [os.path.basename(word) for word in command[:4]]
    if not any(name.startswith("accelerate") for name in names) or "launch" not in command[:5]:
        return None
    given = _option(command, "num_processes")
    if given is not None:
        return int(given) if given.isdigit() else None
    file = _option(command, "config_file")
    try:
        settings = yaml.safe_load(Path(file).read_text()) if file else None
    except (OSError, yaml.YAMLError):
        return None  # accelerate has complained about it already
    found = settings.get("num_processes") if isinstance(settings, dict) else None
    return found if isinstance(found, int) else None


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, with dashes or underscores."""
    for position, word in enumerate(command):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value or (command[position + 1] if position + 1 < len(command) else "")
    return None
