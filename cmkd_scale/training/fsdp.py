"""The door to FSDP2: parameters in shards over all processes (Zhao et al. 2023).

Shards are DTensors under the names that parameters have had before, which is all that the rest
of the program sees of them: ``whole`` and ``like`` go from shards to tensors and back.

torch's own modules are imported where they are needed: they take 0.7 s, a quarter of the time in
which a process starts, and other backends do without.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    compute: torch.dtype | None,
    reshard: bool,
    offload: bool,
) -> None:
    """Shard ``module`` in place; a collective call.

    Each block is gathered when it runs; what is in none of them, as head and projectors, is
    gathered for the whole step, so that losses can read it.

    Args:
        module: on the device it trains on.
        blocks: parts that are gathered one at a time.
        compute: type that weights are gathered in; gradients are reduced in float32.
        reshard: whether a block is let go between forward and backward.
        offload: whether shards lie in CPU memory.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, offload_policy=where)
    fully_shard(module, mp_policy=policy, offload_policy=where)


def reduce_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over processes, or keeps them here."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is a shard, or it itself; a collective call."""
    shard = _as_shard(tensor)
    return tensor if shard is None else shard.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory, or the tensor itself."""
    shard = _as_shard(tensor)
    return tensor if shard is None else shard.to_local()


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A new tensor of ``value``, the same on all processes, in shards like ``pattern``'s."""
    shard = _as_shard(pattern)
    if shard is None or value.shape != shard.shape:
        return value.detach().clone()
    from torch.distributed.tensor import distribute_tensor

    value = value.to(shard.to_local().device, shard.dtype)
    return distribute_tensor(value, shard.device_mesh, shard.placements)


def _as_shard(tensor: Tensor) -> DTensor | None:
    """The same tensor, if it is a shard."""
    if type(tensor) in (Tensor, nn.Parameter):
        return None
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
