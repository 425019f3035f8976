"""The door to FSDP2: parameters in shards over all processes (Zhao et al. 2023).

Shards are DTensors under the names that parameters have had before, which is all that the rest
of the program sees of them: ``whole`` and ``like`` go from shards to tensors and back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor


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
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, mp_policy=policy, offload_policy=where)
    fully_shard(module, mp_policy=policy, offload_policy=where)


def reduce_gradients(module: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass reduces gradients over processes, or keeps them here."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is a shard, or it itself; a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A new tensor of ``value``, the same on all processes, in shards like ``pattern``'s."""
    if isinstance(pattern, DTensor) and value.shape == pattern.shape:
        value = value.to(pattern.to_local().device, pattern.dtype)
        return distribute_tensor(value, pattern.device_mesh, pattern.placements)
    return value.detach().clone()
