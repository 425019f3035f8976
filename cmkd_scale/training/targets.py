"""Where the teacher's signal comes from: a prototype memory.

Targets turn a batch of student features, in the teacher's feature space, into the values that
losses need. They hold no trained parameter; potentials and statistics of the student are part
of the checkpoint. What a batch of all ranks says is exchanged while backward runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmkd_scale import distributed
from cmkd_scale.losses.class_bures import class_bures
from cmkd_scale.losses.global_transport import against_own
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.losses.sinkhorn import annealed_epsilon
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.potentials import Potentials
from cmkd_scale.memory.student_statistics import StudentStatistics
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.exchange import Exchange, Outgoing, joined
from cmkd_scale.training.live_teacher import Values
from cmkd_scale.training.memory_buffers import (
    MemoryBuffers,
    class_soft_labels,
    pooled_buffers,
    prototype_buffers,
)
from cmkd_scale.training.open_transport import OpenTransport
from cmkd_scale.training.transports import ClassMaskedTransport, Moment

_TRANSPORTED = frozenset({"transported", "transported_soft_labels"})
_THROUGH_FEATURES = frozenset(
    {"transported", "bures", "teacher_logits", "projected", "unlabelled_projected"}
)
_POOLED = frozenset({"teacher_mean", "teacher_covariance", "teacher_variance"})
_PROTOTYPES = frozenset({"prototypes", "prototype_class", "target_mass"})
_ROWS = 512  # of the ring are moved at a time when potentials are refreshed
_KEPT_ROWS = 256  # of a global batch at most go into ring and moments: what is sent is bounded
_PRIOR_SAMPLES = 8.0  # that the teacher's moments of a class count for beside the student's


class MemoryTargets(MemoryBuffers):
    """A memory in the student's class order, ready to be read by batches."""

    provides = frozenset(
        {
            *_TRANSPORTED,
            "bures",
            "share",
            "excluded",
            "teacher_logits",
            "class_soft_labels",
            "teacher_head_weight",
            "class_share",
            "temperature",
            "projected",
            "unlabelled_projected",
            "soft_label_table",
            "share_of_class",
            *_POOLED,
            *_PROTOTYPES,
        }
    )
    """Values that losses may ask for."""

    shared_classes: Tensor
    class_share: Tensor
    class_mean: Tensor
    class_variance: Tensor
    class_soft_labels: Tensor
    head_weight: Tensor
    head_bias: Tensor
    excluded: Tensor | None

    def __init__(
        self,
        memory: PrototypeMemory,
        *,
        steps: int,
        options: AlignmentOptions,
        needs: frozenset[str] = provides,
    ) -> None:
        """Lay the memory out.

        Args:
            memory: aligned to the student's class order (``align_to_student``).
            steps: length of the run, for annealing epsilon.
            options: how the student is aligned to it.
            needs: the values that will be asked for; others are not computed.
        """
        self.needs = needs
        super().__init__(memory)
        unknown = ~self.shared_classes
        self.register_buffer("excluded", unknown if unknown.any() else None, persistent=False)
        self.steps = steps
        self.options = options
        self.temperature = memory.temperature
        self.feature_dim = memory.feature_dim
        self.cost_scale = float(memory.cost_scale)
        self.moves = bool(needs & _TRANSPORTED)
        self.reads_features = bool(needs & _THROUGH_FEATURES)
        """Whether a loss has a gradient through the features."""
        relaxation = options.mass_relaxation
        self.potentials = Potentials(
            memory.prototype_mass,
            memory.prototype_class,
            memory.class_count,
            rate=options.potential_rate,
            optimizer=options.potential_optimizer,
            relaxation=math.inf if relaxation is None else relaxation,
            reweight=options.reweight,
        )
        self.transport = _make_transport(memory, options) if self.moves else None
        self.statistics = None
        if (self.moves and options.ring_size > 0) or "bures" in needs:
            self.statistics = StudentStatistics(
                len(memory.class_names),
                memory.feature_dim,
                ring_size=options.ring_size,
                decay=options.moments_decay,
                moments="bures" in needs,
            )
        self._sums: Tensor | None = None

    def layout(self, memory: PrototypeMemory) -> dict[str, Tensor]:
        """What losses read beside the transport."""
        classes = len(memory.class_names)
        shared = torch.bincount(memory.prototype_class, minlength=classes) > 0
        buffers = {
            "shared_classes": shared,
            "class_share": shared.float(),
            "class_mean": memory.class_mean,
            "class_variance": memory.class_variance,
            "head_weight": memory.head_weight,
            "head_bias": memory.head_bias,
        }
        if self.needs & {"class_soft_labels", "soft_label_table"}:
            buffers["class_soft_labels"] = class_soft_labels(memory, shared)
        if self.needs & _POOLED:
            buffers |= pooled_buffers(memory)
        if self.needs & _PROTOTYPES:
            buffers |= prototype_buffers(memory)
        return buffers

    def follow(self, memory: PrototypeMemory) -> None:
        """Take up the memory of the same teacher, moved (``MovingMemory``)."""
        share = self.class_share.clone()  # which other memories of the run have a part in
        super().follow(memory)
        self.class_share.copy_(share)
        if self.transport is not None:
            self.transport.follow(memory)
        self.potentials.follow(memory.prototype_mass)
        self.cost_scale = float(memory.cost_scale)

    def forward(self, features: Tensor, labels: Tensor, step: int) -> tuple[Values, Outgoing]:
        """Read the memory for a batch.

        Args:
            features: [B, D] student features in the teacher's space, with gradient.
            labels: [B] int64.
            step: for the annealing of epsilon.

        Returns:
            The values that are needed, and what this rank's batch has to say.
        """
        features = features.float()
        share = self.class_share[labels]
        values: Values = {
            "share": share,
            "excluded": self.excluded,
            "temperature": self.temperature,
        }
        if "class_soft_labels" in self.needs:
            values["class_soft_labels"] = self.class_soft_labels[labels]
        if "teacher_logits" in self.needs:
            logits = nn.functional.linear(features, self.head_weight, self.head_bias)
            values["teacher_logits"] = exclude_classes(logits, self.excluded)
        if "soft_label_table" in self.needs:
            values["soft_label_table"] = self.class_soft_labels
            values["share_of_class"] = self.class_share
        if "projected" in self.needs:
            values["projected"] = features
        for name in self.needs & (_POOLED | _PROTOTYPES):
            values[name] = getattr(self, name)
        if "bures" in self.needs:
            values["bures"] = self._bures(features, labels)
        return values, Outgoing(
            self._move(features, labels, share, step, values), self._rows(features, labels)
        )

    def start(self, parts: Sequence[Outgoing]) -> Exchange:
        """Begin to exchange what the batches of all ranks have to say; a collective call.

        Args:
            parts: of this rank's batch, one for each part that gradients are accumulated over.
        """
        outgoing = joined(parts, self._kept_rows())
        sums = distributed.start_all_reduce_sum(outgoing.sums)
        rows = None if outgoing.rows is None else distributed.start_gather(outgoing.rows)
        return Exchange(sums, rows)

    def finish(self, exchange: Exchange, step: int) -> None:
        """Take in the batch of all ranks; a collective call."""
        sums = exchange.sums.wait()
        if self.moves:
            self._sums = sums[-3:]
            self.potentials.observe(sums[:-3])
            self.potentials.update(sums[:-3], within_classes=self._within_classes)
        if exchange.rows is not None and self.statistics is not None:
            # [W, b, D + 1] to the global order: position i W + r is row i of rank r.
            rows = exchange.rows.wait().transpose(0, 1).flatten(0, 1)[:_KEPT_ROWS]
            self.statistics.update(rows[:, :-1], rows[:, -1].long(), step)
        every = self.options.refresh_every_steps
        if self.moves and every > 0 and (step + 1) % every == 0:
            self._refresh(step)

    def measures(self, step: int) -> dict[str, float]:
        """What there is to log of the alignment after ``finish`` of ``step``; the same on all
        ranks."""
        found = {}
        if self._sums is not None:
            cost, wrong, samples = self._sums.tolist()
            error = self.potentials.marginal_error(within_classes=self._within_classes)
            found["alignment_marginal_error"] = float(error)
            found["alignment_distance/transport"] = cost / max(samples, 1e-12)
            found["alignment_wrong_class_mass"] = wrong / max(samples, 1e-12)
        if self.statistics is not None and self.options.ring_size > 0:
            found["ring_age_steps"] = float(self.statistics.age(step))
        return found

    def _move(
        self, features: Tensor, labels: Tensor, share: Tensor, step: int, values: Values
    ) -> Tensor:
        """Transport the batch; fills ``values`` in and returns the sums to exchange."""
        if self.transport is None:
            return features.new_zeros(0)
        at = Moment(step, self._epsilon(step))
        moved = self.transport.move(features, labels, share, self.potentials, at)
        values["transported"] = moved.assignment.cost - self._own(features, labels, at)
        if "transported_soft_labels" in self.needs:
            values["transported_soft_labels"] = self.transport.soft_labels(moved, labels)
        cost = moved.assignment.cost.detach() @ share
        return torch.cat([moved.sent, torch.stack([cost, moved.wrong_mass, share.sum()])])

    def _own(self, features: Tensor, labels: Tensor, at: Moment) -> Tensor | float:
        """What debiasing subtracts, once there are recent features."""
        if not self.options.debias or self.statistics is None:
            return 0.0
        recent, recent_labels = self.statistics.recent()
        if len(recent) == 0:
            return 0.0
        return against_own(
            features,
            labels,
            recent=recent,
            recent_labels=recent_labels,
            scale=self.cost_scale,
            epsilon=at.epsilon,
            squared=self.options.cost == "squared_euclidean",
        )

    @property
    def _within_classes(self) -> bool:
        return self.options.transport == "class_masked"

    def _epsilon(self, step: int) -> float:
        return annealed_epsilon(
            step, self.steps, self.options.epsilon_start, self.options.epsilon_end
        )

    def _rows(self, features: Tensor, labels: Tensor) -> Tensor | None:
        if self.statistics is None:
            return None
        first = slice(self._kept_rows())
        kept = features.detach()[first]
        return torch.cat([kept, labels[first].unsqueeze(1).to(kept.dtype)], dim=1)

    @staticmethod
    def _kept_rows() -> int:
        """Of this rank."""
        return -(-_KEPT_ROWS // distributed.world_size())

    def _bures(self, features: Tensor, labels: Tensor) -> Tensor:
        assert self.statistics is not None
        mean, variance = self.class_mean[labels], self.class_variance[labels]
        # What few samples say of a variance may be next to nothing, and the map divides by it.
        weight = self.statistics.weight[labels].unsqueeze(1)
        trust = weight / (weight + _PRIOR_SAMPLES)
        return class_bures(
            features,
            student_mean=torch.lerp(mean, self.statistics.mean[labels], trust),
            student_variance=torch.lerp(variance, self.statistics.variance[labels], trust),
            teacher_mean=mean,
            teacher_variance=variance,
            scale=self.cost_scale,
        )

    @torch.no_grad()
    def _refresh(self, step: int) -> None:
        """Further steps of dual ascent on the ring, each rank moving its part of it."""
        assert self.statistics is not None
        assert self.transport is not None
        features, labels = self.statistics.recent()
        mine = slice(distributed.rank(), None, distributed.world_size())
        features, labels = features[mine], labels[mine]
        share = self.class_share[labels]
        # Ranks may hold parts of the ring of other lengths, and then move other numbers of pieces.
        at = Moment(step, self._epsilon(step), all_ranks_move=False)
        for _ in range(self.options.refresh_iterations):
            sent = torch.zeros(
                len(self.potentials.value) + len(self.shared_classes), device=features.device
            )
            for rows in torch.arange(len(labels), device=features.device).split(_ROWS):
                moved = self.transport.move(
                    features[rows], labels[rows], share[rows], self.potentials, at
                )
                sent += moved.sent
            distributed.all_reduce_sum(sent)
            self.potentials.update(sent, within_classes=self._within_classes)


def _make_transport(
    memory: PrototypeMemory, options: AlignmentOptions
) -> ClassMaskedTransport | OpenTransport:
    if options.transport == "class_masked":
        return ClassMaskedTransport(memory, options)
    return OpenTransport(memory, options)
