"""Student + targets + losses as one module, so that one engine owns every trained parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmkd_scale.losses import LOSSES
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput
from cmkd_scale.training.methods import Method
from cmkd_scale.training.targets import MemoryTargets


class StepResult(NamedTuple):
    """What a forward pass of the training module returns."""

    loss: Tensor
    """[] the weighted sum, with gradient."""
    components: dict[str, Tensor]
    """Its summands, weighted and detached."""
    received: Tensor | None
    """This rank's transported mass, to be summed over ranks after the step."""


class Distillation(nn.Module):
    """A model in training: by its labels alone, or by a teacher's memory too."""

    def __init__(self, model: Model, method: Method, targets: MemoryTargets | None) -> None:
        """Join the model to its losses; the head starts as the teacher's if the method says so.

        Args:
            model: the network to train.
            method: components and weights.
            targets: source of the teacher's values; None for methods without a teacher.
        """
        super().__init__()
        self.model = model
        self.targets = targets
        self.weights: Mapping[str, float] = {
            name: weight for name, weight in method.weights.items() if weight > 0
        }
        if method.head_transfer and targets is not None:
            _transfer_head(model, targets)

    def forward(self, inputs: Tensor, labels: Tensor, step: int) -> StepResult:
        """Loss of a batch: inputs [B, ...], labels [B]."""
        output = self.model(inputs)
        # Under mixed precision the model runs in bfloat16; what compares it with the memory
        # does not.
        with torch.autocast(inputs.device.type, enabled=False):
            return self._losses(output, labels, step)

    def _losses(self, output: ModelOutput, labels: Tensor, step: int) -> StepResult:
        values: dict[str, object] = {
            "features": output.features,
            "logits": output.logits,
            "stages": output.stages,
            "labels": labels,
            "head_weight": self.model.head.weight,
        }
        received = None
        if self.targets is not None:
            provided, received = self.targets(output.features, labels, step)
            values.update(provided)
        components = {}
        for name in self.weights:
            loss = LOSSES[name]
            arguments = {argument: values[value] for argument, value in loss.needs.items()}
            components[name] = self.weights[name] * loss.function(**arguments)
        total = torch.stack(list(components.values())).sum()
        detached = {name: value.detach() for name, value in components.items()}
        return StepResult(loss=total, components=detached, received=received)

    def finish_step(self, received: Tensor | None) -> dict[str, Tensor]:
        """Move the potentials by the batch of all ranks; a collective call.

        Returns:
            Measures of the alignment to log.
        """
        if self.targets is None or received is None:
            return {}
        return {"alignment_marginal_error": self.targets.potentials.update(received)}


@torch.no_grad()
def _transfer_head(model: Model, targets: MemoryTargets) -> None:
    """Start the head as the teacher's where the teacher knows the class."""
    shared = targets.shared_classes
    model.head.weight[shared] = targets.head_weight[shared]
    model.head.bias[shared] = targets.head_bias[shared]
