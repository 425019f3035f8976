"""Student + targets + losses as one module, so that one engine owns every trained parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmkd_scale.data.companions import UNLABELLED, UNLABELLED_WEAK
from cmkd_scale.losses import LOSSES, UNLABELLED_VALUES, Sizes
from cmkd_scale.losses.precision import at_least_float
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput
from cmkd_scale.training.exchange import Exchange, Outgoing
from cmkd_scale.training.live_teacher import SampleTeacher, Values
from cmkd_scale.training.method import Method
from cmkd_scale.training.projectors import (
    Projector,
    make_projectors,
    shares_of,
    transfer_head,
)
from cmkd_scale.training.targets import MemoryTargets

_WEIGHTED = frozenset({"share", "class_share", "share_of_class"})
"""A loss that reads one of these weights its samples or classes by it."""


class StepResult(NamedTuple):
    """What a forward pass of the training module returns."""

    loss: Tensor
    """[] the weighted sum, with gradient."""
    components: dict[str, Tensor]
    """Its summands, weighted and detached."""
    outgoing: tuple[Outgoing, ...]
    """What this rank's batch has to say, for each memory."""
    step: int

    def detached(self) -> StepResult:
        """The same without gradient."""
        return self._replace(loss=self.loss.detach())

    @staticmethod
    def mean(results: Sequence[StepResult]) -> StepResult:
        """Of the parts of a batch, which are equally large; what they have to say is left out."""
        count = len(results)
        components = {
            name: torch.stack([result.components[name] for result in results]).sum() / count
            for name in results[0].components
        }
        loss = torch.stack([result.loss for result in results]).sum() / count
        return StepResult(loss, components, (), results[0].step)


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
    """A model in training: by its labels alone, or by teachers, too."""

    class_share: Tensor

    def __init__(
        self,
        model: Model,
        method: Method,
        targets: Sequence[MemoryTargets] = (),
        *,
        live: SampleTeacher | None = None,
        cohort: Sequence[Model] = (),
        sizes: Sizes | None = None,
        trust: Sequence[float] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        """Join the model to its losses; the head starts as the teachers' if the method says so.

        The first teacher of the student's own width shares its feature space. Any other has a
        space of its own, which a projector maps the student's features to.

        Args:
            model: the network to train.
            method: components and weights.
            targets: a memory each; none for methods without one.
            live: the teacher that is read sample by sample, if the method needs one.
            cohort: further students that learn along (``mutual``).
            sizes: of student and live teacher, for losses that have parameters.
            trust: of each memory, 0 to 1, as the guard has it; none given: full.
            autocast: type in which the model computes what it may; None: that of its inputs.
        """
        super().__init__()
        self.autocast = autocast
        self.model = model
        self.targets = nn.ModuleList(targets)
        self.memories = tuple(targets)
        self.live = live
        self.cohort = nn.ModuleList(cohort)
        self.weights: Mapping[str, float] = {
            name: weight for name, weight in method.weights.items() if weight > 0
        }
        self.method = method
        self.wanted = method.values
        self.projectors = make_projectors(model, targets, live, method)
        self.parts = nn.ModuleDict()
        self._functions = {name: LOSSES[name].function for name in method.components}
        for name in method.components:
            build = LOSSES[name].build
            if build is not None:
                assert sizes is not None
                self.parts[name] = self._functions[name] = build(sizes)
        self.trust = tuple(trust) or (1.0,) * len(targets)
        if targets:
            self.register_buffer("class_share", shares_of(targets, self.trust), persistent=False)
            self.part_of = tuple(self.class_share.max(1).values.tolist())
            for target, share in zip(targets, self.class_share, strict=True):
                target.class_share.copy_(share)
            if method.head_transfer:
                transfer_head(model, self._heads(), self.class_share)

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        step: int,
        beside: Mapping[str, Tensor] | None = None,
        inner: str | None = None,
    ) -> StepResult:
        """Loss of a batch.

        Args:
            inputs: [B, ...]
            labels: [B]
            step: number of the step.
            beside: what else the step reads, see ``data/companions``.
            inner: the one component to compute, with weight 1, instead of the method's.
        """
        device = inputs.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            output = self.model(inputs)
            values = self._values(output, inputs, beside or {})
        weights = self.weights if inner is None else {inner: 1.0}
        # What compares the model with the teacher is computed in float32.
        with torch.autocast(device, enabled=False):
            return self._losses({**values, "labels": labels}, labels, step, weights)

    def _values(self, output: ModelOutput, inputs: Tensor, beside: Mapping[str, Tensor]) -> Values:
        """What student, cohort and live teacher say of the batch."""
        values: Values = {
            "features": output.features,
            "logits": output.logits,
            "stages": output.stages,
            # In a sharded model, weights are gathered in the type that it computes in.
            "head_weight": at_least_float(self.model.head.weight),
        }
        if "detached_logits" in self.wanted:
            values["detached_logits"] = self.model.head(output.features.detach())
        if self.cohort:
            others = (member(inputs).logits for member in self.cohort)
            values["cohort_logits"] = (output.logits, *others)
        if UNLABELLED_VALUES & self.wanted:
            unlabelled = self.model(beside[UNLABELLED])
            values["unlabelled_logits"] = unlabelled.logits
            values["unlabelled_features"] = unlabelled.features
            with torch.no_grad():
                values["unlabelled_weak_logits"] = self.model(beside[UNLABELLED_WEAK]).logits
        if self.live is not None:
            values |= self.live(*(beside[name] for name in self.live.reads))
        return values

    def _losses(
        self, own: Values, labels: Tensor, step: int, weights: Mapping[str, float]
    ) -> StepResult:
        features = own["features"]
        assert isinstance(features, Tensor)
        components: dict[str, Tensor] = {}
        outgoing = []
        for number, target in enumerate(self.memories):
            projected = self.projectors[number](at_least_float(features))
            provided, out = target(projected, labels, step)
            outgoing.append(out)
            if "unlabelled_projected" in self.wanted:
                unlabelled = own["unlabelled_features"]
                assert isinstance(unlabelled, Tensor)
                provided["unlabelled_projected"] = self.projectors[number](unlabelled.float())
            if "teacher_head_weight" in self.wanted:
                provided["teacher_head_weight"] = self._head(number)[0]
                share = self.class_share[number]
                weight = self.trust[number] / share.sum().clamp(min=1e-12)
                provided["class_share"] = share * weight
            self._add(components, weights, {**own, **provided}, self.part_of[number])
        if self.live is not None:
            self._add(components, weights, {**own, **self._of_live(features)}, 1.0)
        self._add(components, weights, own)
        total_loss = torch.stack([components[name] for name in weights]).sum()
        detached = {name: components[name].detach() for name in weights}
        return StepResult(total_loss, detached, tuple(outgoing), step)

    def _of_live(self, features: Tensor) -> Values:
        """The student's features as the live teacher sees them."""
        assert self.live is not None
        projected = self.projectors[-1](at_least_float(features))
        values: Values = {"projected": projected}
        if "teacher_logits" in self.wanted:
            values["teacher_logits"] = self.live.read_head(projected)
        if "detached_teacher_logits" in self.wanted:
            values["detached_teacher_logits"] = self.live.read_head(projected.detach())
        return values

    def _add(
        self,
        components: dict[str, Tensor],
        weights: Mapping[str, float],
        values: Values,
        part: float | None = None,
    ) -> None:
        """Add what the components come to with these values, weighted.

        Args:
            components: the sums so far.
            weights: of the components.
            values: what they read.
            part: of all teachers that this one counts for; None: the student's own components.
        """
        for name, weight in weights.items():
            loss = LOSSES[name]
            if loss.by_teacher != (part is not None):
                continue
            arguments = {argument: values[value] for argument, value in loss.needs.items()}
            value = self._functions[name](**arguments)
            if part is not None and not _WEIGHTED & set(loss.needs.values()):
                value = part * value
            components[name] = components.get(name, 0.0) + weight * value

    def start_step(self, results: Sequence[StepResult]) -> Underway:
        """Begin to exchange what the batches of all ranks say, before backward; collective.

        Args:
            results: of the parts of this rank's batch.
        """
        said = zip(*(result.outgoing for result in results), strict=True)
        exchanges = (target.start(parts) for target, parts in zip(self.memories, said, strict=True))
        return Underway(tuple(exchanges), results[0].step)

    def finish_step(self, underway: Underway) -> None:
        """Move potentials and statistics by the batch of all ranks; a collective call."""
        for target, exchange in zip(self.memories, underway.exchanges, strict=True):
            target.finish(exchange, underway.step)

    def measures(self, step: int) -> dict[str, float]:
        """What there is to log of the alignment after ``step``; means over the memories."""
        rows = [target.measures(step) for target in self.memories]
        names = rows[0] if rows else {}
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
        if self.trust:
            means["guard_weight"] = sum(self.trust) / len(self.trust)
        return means

    def synchronised(self) -> list[Tensor]:
        """Tensors that must be the same bits on all ranks: memories, potentials, statistics."""
        return [tensor for target in self.memories for tensor in target.buffers()]

    def _head(self, number: int) -> tuple[Tensor, Tensor]:
        """The teacher's head read on the student's own features: [C, D] and [C].

        Behind a projector ``g(z) = G z + b`` the head ``W`` is ``W G``, exactly.
        """
        target, projector = self.memories[number], self.projectors[number]
        if not isinstance(projector, Projector):
            return target.head_weight, target.head_bias
        matrix, offset = projector.weight.detach().float(), projector.bias.detach().float()
        return target.head_weight @ matrix, target.head_bias + target.head_weight @ offset

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [self._head(number) for number in range(len(self.memories))]
