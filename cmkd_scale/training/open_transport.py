"""Transport in which every prototype is open to every sample: by soft labels, or by features alone.

With many prototypes, a search finds the candidates of each sample; how much of the plan they
hold is measured, and below a threshold all prototypes are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import UsageError
from cmkd_scale.losses.global_transport import Assignment, against_all, against_candidates
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.potentials import Potentials
from cmkd_scale.memory.prototypes import PrototypeIndex
from cmkd_scale.memory.soft_labels import SoftLabels
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.memory_buffers import MemoryBuffers, SoftLabelTable, class_columns
from cmkd_scale.training.transports import Moment, Moved

_CHECKED = 8  # samples of the global batch in a check of the search
_LARGEST_TABLE = 4 << 30  # bytes
_SOFT_LABEL_CANDIDATES = 64  # heaviest entries of a plan over all prototypes, for soft labels


class OpenTransport(MemoryBuffers):
    """Every prototype is open to every sample: by soft labels, or by features alone."""

    columns: Tensor
    filled: Tensor
    prototypes: Tensor
    square_norms: Tensor
    prototype_class: Tensor
    surprise: Tensor
    searched: Tensor
    captured: Tensor

    def __init__(self, memory: PrototypeMemory, options: AlignmentOptions) -> None:
        """Lay out ``memory``; with ``search_candidates`` an index over it, too."""
        self.by_label = options.transport == "soft_label"
        super().__init__(memory)
        self.scale = float(memory.cost_scale)
        self.options = options
        self.squared = options.cost == "squared_euclidean"
        self.table = SoftLabelTable(memory)
        wanted = options.search_candidates
        self.searches = wanted is not None and wanted < len(self.prototypes)
        self._index: PrototypeIndex | None = None
        if self.searches:
            # Saved, so that a run that goes on finds the same candidates.
            self.register_buffer("searched", torch.zeros_like(self.square_norms))
            self.register_buffer("captured", torch.zeros(()))

    def layout(self, memory: PrototypeMemory) -> dict[str, Tensor]:
        """Prototypes, their squared lengths, and how much each class would surprise them [C, J]."""
        columns, filled = class_columns(memory)
        buffers = {
            "columns": columns,
            "filled": filled,
            "prototypes": memory.prototypes,
            "square_norms": memory.prototypes.square().sum(1),
            "prototype_class": memory.prototype_class,
        }
        if self.by_label:
            soft = SoftLabels(
                memory.soft_label_values, memory.soft_label_classes, memory.soft_label_rest
            )
            size = 4 * len(memory.prototypes) * len(memory.class_names)
            if size > _LARGEST_TABLE:
                raise UsageError(
                    f"method.transport=soft_label needs a table of {size / 2**30:.0f} GiB for "
                    f"{len(memory.prototypes)} prototypes and {len(memory.class_names)} classes: "
                    "use class_masked or label_free, or fewer memory.prototypes_per_class."
                )
            known = torch.bincount(memory.prototype_class, minlength=len(memory.class_names)) > 0
            buffers["surprise"] = -soft.dense(known).clamp(min=1e-6).log().T.contiguous()
        return buffers

    def follow(self, memory: PrototypeMemory) -> None:
        """Take up the memory of a teacher that has moved."""
        super().follow(memory)
        self.table.follow(memory)
        self.scale = float(memory.cost_scale)
        self._index = None

    def move(
        self, features: Tensor, labels: Tensor, share: Tensor, potentials: Potentials, at: Moment
    ) -> Moved:
        """Move features [B, D]; labels [B] steer it in the mode ``soft_label`` only."""
        log_mass = potentials.target().log()
        found = self._search(features, potentials, log_mass, at)
        if found is None:
            assignment = self._against_all(features, labels, potentials, log_mass, at.epsilon)
            sent = potentials.sent_to_all(assignment.ascent, labels, share)
            # Of the own class alone: a comparison of all would be as large as the plan.
            own = assignment.plan.gather(1, self.columns[labels]) * self.filled[labels]
            wrong = (assignment.plan.sum(1) - own.sum(1)).clamp(min=0.0) @ share
            width = min(_SOFT_LABEL_CANDIDATES, assignment.plan.shape[1])
            heaviest = assignment.plan.topk(width, dim=1)
            plan = heaviest.values / heaviest.values.sum(1, keepdim=True).clamp(min=1e-12)
            return Moved(
                Assignment(assignment.cost, plan, assignment.ascent), heaviest.indices, sent, wrong
            )
        ids, rising = found.clamp(min=0), potentials.ascending
        assignment = against_candidates(
            features,
            candidates=self.prototypes[ids],
            log_mass=log_mass[ids].masked_fill(found < 0, -torch.inf),
            potentials=potentials.current[ids],
            ascending=None if rising is None else rising[ids],
            scale=self.scale,
            epsilon=at.epsilon,
            squared=self.squared,
        )
        sent = potentials.sent_within_classes(assignment.ascent, ids, labels, share)
        others = self.prototype_class[ids] != labels.unsqueeze(1)
        return Moved(assignment, ids, sent, (assignment.plan * others).sum(1) @ share)

    def soft_labels(self, moved: Moved, labels: Tensor) -> Tensor:
        """[B, C] soft labels of where the mass went."""
        soft: Tensor = self.table(moved.assignment.plan, moved.ids)
        return soft

    def _against_all(
        self,
        features: Tensor,
        labels: Tensor,
        potentials: Potentials,
        log_mass: Tensor,
        epsilon: float,
    ) -> Assignment:
        return against_all(
            features,
            prototypes=self.prototypes,
            square_norms=self.square_norms,
            log_mass=log_mass,
            potentials=potentials.current,
            ascending=potentials.ascending,
            scale=self.scale,
            epsilon=epsilon,
            squared=self.squared,
            label_cost=self.options.label_cost * self.surprise[labels] if self.by_label else None,
        )

    @torch.no_grad()
    def _search(
        self, features: Tensor, potentials: Potentials, log_mass: Tensor, at: Moment
    ) -> Tensor | None:
        """Candidates [B, k] of each sample, -1 where there are fewer; None: look at all.

        Every ``search_refresh_steps`` the index takes up the potentials, and some samples are
        checked against all prototypes: if the candidates hold too little of the mass, all
        prototypes are looked at until the next check. A collective call at those steps.
        """
        if not self.searches:
            return None
        wanted = self.options.search_candidates or len(self.prototypes)
        due = at.all_ranks_move and at.step % self.options.search_refresh_steps == 0
        if due:
            # A score is (v - c) / epsilon + log b: log b acts like a potential.
            self.searched.copy_(potentials.current + at.epsilon * log_mass.clamp(min=-1e4))
        if self._index is None:
            self._index = PrototypeIndex(self.prototypes, scale=self.scale)
            self._index.refresh(self.searched)
        elif due:
            self._index.refresh(self.searched)
        if due:
            self._check(features.detach().float(), wanted, potentials, log_mass, at)
        if float(self.captured) < self.options.search_least_mass:
            return None
        return self._index.search(features.detach().float(), wanted)[1]

    def _check(
        self, rows: Tensor, wanted: int, potentials: Potentials, log_mass: Tensor, at: Moment
    ) -> None:
        """Measure what share of the whole plan the candidates hold, of the first samples of the
        global batch: row i of rank r is its sample i W + r, for any W."""
        assert self._index is not None
        first = range(distributed.rank(), _CHECKED, distributed.world_size())
        rows = rows[: len(first)]
        sums = rows.new_tensor([0.0, float(len(rows))])
        if len(rows):
            ids = self._index.search(rows, wanted)[1]
            whole = self._against_all(rows, ids[:, 0], potentials, log_mass, at.epsilon).plan
            sums[0] = whole.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).sum()
        held, samples = distributed.all_reduce_sum(sums)
        self.captured.copy_(held / samples)
