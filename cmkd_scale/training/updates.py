"""The bilevel update: the gradient of a student that inner steps have adapted.

Finn et al. 2017 (MAML), first order, as UCMKD's algorithm 1 uses it: weights w are moved to w' by
a few steps of a fresh optimizer on the inner losses; the outer loss's gradient at w' is applied at
w, and w' is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.method import Method


class Bilevel:
    """The inner loop of a method, in place."""

    def __init__(self, module: Distillation) -> None:
        """Of the inner components of the module's method on its parameters."""
        self.module = module
        self.method = module.method

    @contextmanager
    def adapted(
        self, inputs: Tensor, labels: Tensor, step: int, beside: Mapping[str, Tensor]
    ) -> Iterator[None]:
        """Within, the parameters are the adapted ones; a collective call.

        Gradients of the inner losses are means over all ranks, so that all adapt alike.
        """
        trained = [p for p in self.module.parameters() if p.requires_grad]
        own = [parameter.detach().clone() for parameter in trained]
        optimizer = torch.optim.AdamW(
            trained,
            lr=self.method.inner_learning_rate,
            weight_decay=self.method.inner_weight_decay,
        )
        for name, count in self.method.inner:
            for _ in range(count):
                result = self.module(inputs, labels, step, beside, inner=name)
                self._descend(result.loss, trained, optimizer)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, own, strict=True):
                    parameter.copy_(value)

    @staticmethod
    def _descend(loss: Tensor, trained: list[nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        # Not by backward, which DDP's hooks would take for the step's own.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        touched = [
            (parameter, gradient)
            for parameter, gradient in zip(trained, gradients, strict=True)
            if gradient is not None
        ]
        world = distributed.world_size()
        if world > 1:
            flat = torch.cat([gradient.reshape(-1) for _, gradient in touched])
            mean = distributed.all_reduce_sum(flat) / world
            pieces = mean.split([gradient.numel() for _, gradient in touched])
        else:
            pieces = tuple(gradient.reshape(-1) for _, gradient in touched)
        for (parameter, gradient), piece in zip(touched, pieces, strict=True):
            parameter.grad = piece.view_as(gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def check_update(method: Method, backend: str, parts: int) -> None:
    """Refuse a bilevel method where no process holds the whole student, or batches are cut.

    Raises:
        UsageError: naming what to launch instead.
    """
    if method.update != "bilevel":
        return
    if backend not in ("single", "ddp"):
        raise UsageError(
            "A bilevel method (ucmkd_reference, ucmkd_fixed) moves all weights there and back "
            f"within a step, and under {backend} no process holds them whole: launch it on one "
            "process or with DDP (BACKEND=ddp)."
        )
    if parts > 1:
        raise UsageError(
            "A bilevel method adapts to the batch of the step, which gradient accumulation cuts "
            "up: set train.gradient_accumulation_steps=1."
        )
