"""A forward and backward pass, looked at: its FLOPs, and what each operation allocates.

Allocations are counted where they are made, so that the peak is that of the losses, the recomputed
blocks and the gradients of activations too, on any device; what kernels use inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from cmkd_scale.training.distillation import Distillation


@dataclass(frozen=True, slots=True)
class Traced:
    """What one pass over a batch takes."""

    activation_bytes: int
    """Most that was alive at once beside parameters and their gradients."""
    inference_bytes: int
    """The same of a forward pass without gradients, as evaluation makes it."""
    flops: float
    """Of matrix products and convolutions, forward and backward; a multiply-add counts two."""


def trace(
    module: Distillation, inputs: Tensor, labels: Tensor, beside: Mapping[str, Tensor]
) -> Traced:
    """Pass a batch forward and backward, twice; the module's gradients are gone afterwards.

    Args:
        module: not wrapped by any backend, on the device it trains on.
        inputs: [B, ...] on that device, as are the others.
        labels: [B].
        beside: what else the step reads.
    """
    # In a pass of its own: it keeps what recomputed blocks would let go.
    with FlopCounterMode(display=False) as counter:
        module(inputs, labels, 0, beside).loss.backward()
    module.zero_grad(set_to_none=True)
    known = [*module.parameters(), *module.buffers(), inputs, labels]
    with torch.no_grad(), _Allocations(known) as inference:
        module.model(inputs)
    allocations = _Allocations(known)
    handles = [
        parameter.register_post_accumulate_grad_hook(allocations.claim)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        with allocations:
            module(inputs, labels, 0, beside).loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        module.zero_grad(set_to_none=True)
    return Traced(
        activation_bytes=allocations.peak,
        inference_bytes=inference.peak,
        flops=float(counter.get_total_flops()),
    )


class _Allocations(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By identity: torch keeps one object for a storage as long as any tensor has it.
        self._sizes: dict[int, int] = {}
        self._known = [tensor.untyped_storage() for tensor in known]
        self._known_ids = set(map(id, self._known))
        self._live = 0
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def claim(self, parameter: Tensor) -> None:
        """Count a parameter's gradient no longer."""
        assert parameter.grad is not None
        self._forget(id(parameter.grad.untyped_storage()))

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes or key in self._known_ids:
            return
        self._sizes[key] = storage.nbytes()
        self._live += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self._live)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
