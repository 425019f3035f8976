"""Exponential moving average of the trained weights, in the parts that a process holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cmkd_scale.training import fsdp
from cmkd_scale.training.backends import Backend


class WeightAverage:
    """Average of a backend's parameters (Polyak and Juditsky 1992, exponentially weighted)."""

    def __init__(self, backend: Backend, decay: float) -> None:
        """Start at the parameters as they are.

        Args:
            backend: whose parameters; their names are those of the average.
            decay: weight that the average keeps at each step, once there are many of them.
        """
        self.backend = backend
        self.decay = decay
        self.parts = {
            name: backend.held(parameter).clone()
            for name, parameter in backend.parameters().items()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after ``step``: at first as if the run had just begun."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = self.backend.parameters()
        now = [fsdp.local(self.backend.held(parameters[name])) for name in self.parts]
        torch._foreach_lerp_([fsdp.local(part) for part in self.parts.values()], now, 1.0 - decay)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's average, whole; each item is a collective call."""
        parameters = self.backend.parameters()
        for name, part in self.parts.items():
            yield name, self.backend.whole(parameters[name], part)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        parameters = self.backend.parameters()
        self.parts = {name: self.backend.cut(parameters[name], state[name]) for name in self.parts}
