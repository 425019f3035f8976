"""Student + targets + losses as one module, so that one engine owns every trained parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmkd_scale.losses import LOSSES
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput
from cmkd_scale.training.exchange import Exchange, Outgoing
from cmkd_scale.training.methods import Method
from cmkd_scale.training.targets import MemoryTargets, Values


class StepResult(NamedTuple):
    """What a forward pass of the training module returns."""

    loss: Tensor
    """[] the weighted sum, with gradient."""
    components: dict[str, Tensor]
    """Its summands, weighted and detached."""
    outgoing: tuple[Outgoing, ...]
    """What this rank's batch has to say, for each memory."""
    step: int


class Underway(NamedTuple):
    """A step whose exchange between ranks has begun."""

    exchanges: tuple[Exchange, ...]
    step: int

    @property
    def bytes_on_wire(self) -> float:
        """What this rank sends."""
        return sum(exchange.bytes_on_wire for exchange in self.exchanges)

    def wait(self) -> None:
        """Until all of it is here: what backward has not hidden."""
        for exchange in self.exchanges:
            exchange.wait()


class Distillation(nn.Module):
    """A model in training: by its labels alone, or by the memories of teachers, too."""

    class_share: Tensor

    def __init__(
        self,
        model: Model,
        method: Method,
        targets: Sequence[MemoryTargets] = (),
    ) -> None:
        """Join the model to its losses; the head starts as the teachers' if the method says so.

        The first memory of the student's own width shares its feature space. Any other has a
        space of its own, which a projector maps the student's features to.

        Args:
            model: the network to train.
            method: components and weights.
            targets: a memory each; none for methods without a teacher.
        """
        super().__init__()
        self.model = model
        self.targets = nn.ModuleList(targets)
        self.memories = tuple(targets)
        width = model.head.in_features
        shares = place_for_own_space(width, targets)
        self.projectors = nn.ModuleList(
            nn.Identity() if number == shares else make_projector(width, target.feature_dim)
            for number, target in enumerate(targets)
        )
        for target, projector in zip(targets, self.projectors, strict=True):
            # One that no loss reads has no gradient, which DDP would wait for.
            projector.requires_grad_(target.reads_features)
        self.weights: Mapping[str, float] = {
            name: weight for name, weight in method.weights.items() if weight > 0
        }
        self.wanted = frozenset(v for name in self.weights for v in LOSSES[name].needs.values())
        if targets:
            self.register_buffer("class_share", shares_of(targets), persistent=False)
            for target, share in zip(targets, self.class_share, strict=True):
                target.class_share.copy_(share)
            if method.head_transfer:
                _transfer_head(model, self._heads(), self.class_share)

    def forward(self, inputs: Tensor, labels: Tensor, step: int) -> StepResult:
        """Loss of a batch: inputs [B, ...], labels [B]."""
        output = self.model(inputs)
        # Under mixed precision the model runs in bfloat16; what compares it with the memory
        # does not.
        with torch.autocast(inputs.device.type, enabled=False):
            return self._losses(output, labels, step)

    def _losses(self, output: ModelOutput, labels: Tensor, step: int) -> StepResult:
        own: Values = {
            "features": output.features,
            "logits": output.logits,
            "labels": labels,
            "head_weight": self.model.head.weight,
        }
        components: dict[str, Tensor] = {}
        outgoing = []
        for number, (target, projector) in enumerate(
            zip(self.memories, self.projectors, strict=True)
        ):
            features = projector(output.features.float())
            provided, out = target(features, labels, step)
            outgoing.append(out)
            if "teacher_head_weight" in self.wanted:
                provided["teacher_head_weight"] = self._head(number)[0]
                provided["class_share"] = self.class_share[number] / self.class_share.sum()
            for name in self.weights:
                if LOSSES[name].by_teacher:
                    value = self._component(name, {**own, **provided, "stages": output.stages})
                    components[name] = components.get(name, 0.0) + value
        for name in self.weights:
            if not LOSSES[name].by_teacher:
                components[name] = self._component(name, {**own, "stages": output.stages})
        total = torch.stack([components[name] for name in self.weights]).sum()
        detached = {name: components[name].detach() for name in self.weights}
        return StepResult(total, detached, tuple(outgoing), step)

    def _component(self, name: str, values: Mapping[str, object]) -> Tensor:
        loss = LOSSES[name]
        arguments = {argument: values[value] for argument, value in loss.needs.items()}
        return self.weights[name] * loss.function(**arguments)

    def start_step(self, result: StepResult) -> Underway:
        """Begin to exchange what the batches of all ranks say, before backward; collective."""
        exchanges = (
            target.start(out) for target, out in zip(self.memories, result.outgoing, strict=True)
        )
        return Underway(tuple(exchanges), result.step)

    def finish_step(self, underway: Underway) -> None:
        """Move potentials and statistics by the batch of all ranks; a collective call."""
        for target, exchange in zip(self.memories, underway.exchanges, strict=True):
            target.finish(exchange, underway.step)

    def measures(self, step: int) -> dict[str, float]:
        """What there is to log of the alignment after ``step``; means over the memories."""
        rows = [target.measures(step) for target in self.memories]
        names = rows[0] if rows else {}
        return {name: sum(row[name] for row in rows) / len(rows) for name in names}

    def synchronised(self) -> list[Tensor]:
        """Tensors that must be the same bits on all ranks: memories, potentials, statistics."""
        return [tensor for target in self.memories for tensor in target.buffers()]

    def _head(self, number: int) -> tuple[Tensor, Tensor]:
        """The teacher's head read on the student's own features: [C, D] and [C].

        Behind a projector ``g(z) = G z + b`` the head ``W`` is ``W G``, exactly.
        """
        target, projector = self.memories[number], self.projectors[number]
        if not isinstance(projector, nn.Linear):
            return target.head_weight, target.head_bias
        matrix, offset = projector.weight.detach(), projector.bias.detach()
        return target.head_weight @ matrix, target.head_bias + target.head_weight @ offset

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [self._head(number) for number in range(len(self.memories))]


def place_for_own_space(width: int, targets: Sequence[MemoryTargets]) -> int | None:
    """Which memory the student shares its feature space with: the first of its own width."""
    widths = [target.feature_dim for target in targets]
    return widths.index(width) if width in widths else None


def shares_of(targets: Sequence[MemoryTargets]) -> Tensor:
    """[M, C] weight of each of M memories for each class: equal parts among those that know it."""
    known = torch.stack([target.shared_classes for target in targets]).float()
    return known / known.sum(0).clamp(min=1.0)


def make_projector(width: int, out: int) -> nn.Linear:
    """From the student's features [., width] to a teacher's space [., out].

    It starts as an isometry (Saxe et al. 2014), scaled so that features keep the mean
    square of their entries, which the models' last LayerNorm sets to 1 on both sides.
    """
    linear = nn.Linear(width, out)
    nn.init.orthogonal_(linear.weight, gain=math.sqrt(max(1.0, out / width)))
    nn.init.zeros_(linear.bias)
    return linear


@torch.no_grad()
def _transfer_head(model: Model, heads: list[tuple[Tensor, Tensor]], class_share: Tensor) -> None:
    """Start the head as the teachers' where they know the class; a mean if several do."""
    known = class_share.sum(0) > 0
    weight = sum(
        share.unsqueeze(1) * head for share, (head, _) in zip(class_share, heads, strict=True)
    )
    bias = sum(share * offset for share, (_, offset) in zip(class_share, heads, strict=True))
    model.head.weight[known] = weight[known]
    model.head.bias[known] = bias[known]
