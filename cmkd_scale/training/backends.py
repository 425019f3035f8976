"""How parameters, gradients and optimizer states are spread over processes.

A backend runs the backward pass and the update, and knows its tensors whole: checkpoints hold
them under the parameters' names as if there were one process, so that any backend continues
from what any other wrote. ``Replicated`` is one process or DDP, ``Sharded`` is FSDP2; ``Zero``
(DeepSpeed) has a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cmkd_scale.errors import IntegrityError
from cmkd_scale.training import fsdp

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""
STEP = "step"
"""AdamW's own count of a parameter's updates, beside its moments."""


class Backend(ABC):
    """One module, its gradients and its optimizer."""

    wrapped: nn.Module
    """What is called for a forward pass."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take a module and an optimizer of its parameters, as they are after wrapping."""
        self.module = module
        self.optimizer = optimizer

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; what can be trained and what is frozen."""
        return dict(self.module.named_parameters())

    def set_learning_rate(self, value: float) -> None:
        """Of the next update: each group has its scale of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = value * group["scale"]

    @abstractmethod
    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a part of the batch; the last one ends in a reduction."""

    @abstractmethod
    def backward(self, loss: Tensor, parts: int) -> None:
        """Add the gradient of ``loss / parts``."""

    @abstractmethod
    def update(self, clip: float) -> Tensor:
        """Move the parameters by the clipped gradient and forget it.

        Returns:
            Its norm [] before clipping. If that is not finite, nothing has moved.
        """

    @abstractmethod
    def held(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of a parameter, sharing its memory."""

    @abstractmethod
    def whole(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """What all parts of a parameter, or of its average, make; a collective call."""

    @abstractmethod
    def cut(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This process's part of a whole ``value`` of a parameter, in a new tensor."""

    @abstractmethod
    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """``PARAMETER/MOMENT`` and the whole of it; each item is a collective call."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``optimizer_state`` of any backend gave, before the first update.

        Raises:
            IntegrityError: it has parameters that are not here.
        """


class Replicated(Backend):
    """Each process holds all of it."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        wrapped: nn.Module,
    ) -> None:
        """``wrapped`` is the module itself, or DDP around it."""
        super().__init__(module, optimizer)
        self.wrapped = wrapped

    def part(self, last: bool) -> AbstractContextManager[None]:
        """See ``Backend``."""
        if last or self.wrapped is self.module:
            return nullcontext()
        alone: AbstractContextManager[None] = self.wrapped.no_sync()  # type: ignore[operator]
        return alone

    def backward(self, loss: Tensor, parts: int) -> None:
        """See ``Backend``."""
        (loss / parts).backward()

    @torch.no_grad()
    def update(self, clip: float) -> Tensor:
        """See ``Backend``."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        found = fsdp.whole(norm)
        if torch.isfinite(found):
            torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See ``Backend``."""
        return parameter.detach()

    def whole(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """See ``Backend``."""
        return fsdp.whole(held)

    def cut(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """See ``Backend``."""
        return fsdp.like(value, parameter.detach()).to(parameter.device)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """See ``Backend``."""
        for name, parameter in self.parameters().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}", fsdp.whole(value)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """See ``Backend``."""
        parameters = self.parameters()
        for name, moments in by_parameter(state, parameters).items():
            parameter = parameters[name]
            self.optimizer.state[parameter] = {
                key: value.clone() if key == STEP else self.cut(parameter, value)
                for key, value in moments.items()
            }
            if _is_fused(self.optimizer):
                step = self.optimizer.state[parameter][STEP]
                self.optimizer.state[parameter][STEP] = step.to(parameter.device)


class Sharded(Replicated):
    """FSDP2: each process holds a shard of each parameter, its gradient and its moments."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """``module`` has been sharded (``fsdp.shard``), and then the optimizer was made."""
        super().__init__(module, optimizer, module)

    @contextmanager
    def _reducing(self, wanted: bool) -> Iterator[None]:
        fsdp.reduce_gradients(self.module, wanted)
        yield

    def part(self, last: bool) -> AbstractContextManager[None]:
        """See ``Backend``."""
        return self._reducing(last)


def by_parameter(
    state: Mapping[str, Tensor], parameters: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """``PARAMETER/MOMENT`` -> tensor, as parameter -> moment -> tensor.

    Raises:
        IntegrityError: a parameter is not among ``parameters``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            raise IntegrityError(f"The checkpoint's optimizer has no parameter {name} here.")
        found.setdefault(name, {})[moment] = value
    return found


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
