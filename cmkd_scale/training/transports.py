"""Three ways to move a batch onto a memory's prototypes; each keeps what it reads laid out.

- ``class_masked``: a sample goes to the prototypes of its own class alone; O(B K D).
- ``soft_label``: to any prototype, at a price for one whose soft label does not expect the
  sample's class; O(B J D).
- ``label_free``: to any prototype by features alone. Of the labels it takes their shares only,
  for the target masses. With many prototypes it looks at those that a search finds.

The last two are in ``open_transport``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmkd_scale.losses.global_transport import Assignment, block_sums, class_masked
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.potentials import Potentials
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.memory_buffers import MemoryBuffers, SoftLabelTable, class_columns


class Moment(NamedTuple):
    """Where training stands."""

    step: int
    epsilon: float
    """Entropic regularisation, in units of the cost."""
    all_ranks_move: bool = True
    """Whether every rank moves a batch now, so that collective calls are in order."""


class Moved(NamedTuple):
    """A batch on its way."""

    assignment: Assignment
    ids: Tensor
    """[B, K] int64 prototype of each column of the plan."""
    sent: Tensor
    """[J + C] mass this rank sends, see ``Potentials``."""
    wrong_mass: Tensor
    """[] mass sent to prototypes of another class than the sample's, summed over the batch."""


class ClassMaskedTransport(MemoryBuffers):
    """The prototypes of a class lie side by side in a block of K rows, relative to its mean.

    K is the widest class's number; shorter ones are filled up at mass zero.
    """

    columns: Tensor
    log_mass: Tensor
    blocks: Tensor
    block_norms: Tensor
    class_mean: Tensor
    soft_blocks: Tensor

    def __init__(self, memory: PrototypeMemory, options: AlignmentOptions) -> None:
        """Lay out ``memory``."""
        super().__init__(memory)
        self.scale = float(memory.cost_scale)
        self.squared = options.cost == "squared_euclidean"
        self.table = SoftLabelTable(memory)

    def layout(self, memory: PrototypeMemory) -> dict[str, Tensor]:
        """Blocks and the columns [C, K] that they came from."""
        columns, valid = class_columns(memory)
        blocks = memory.prototypes[columns] - memory.class_mean.unsqueeze(1)
        buffers = {
            "columns": columns,
            "log_mass": memory.prototype_mass.log()[columns].masked_fill(~valid, -torch.inf),
            "blocks": blocks,
            "block_norms": blocks.square().sum(2),
            "class_mean": memory.class_mean,
        }
        if memory.soft_label_values.shape[1] >= len(memory.class_names):
            buffers["soft_blocks"] = memory.soft_label_values[columns]
        return buffers

    def follow(self, memory: PrototypeMemory) -> None:
        """Take up the memory of a teacher that has moved."""
        super().follow(memory)
        self.table.follow(memory)
        self.scale = float(memory.cost_scale)

    def move(
        self, features: Tensor, labels: Tensor, share: Tensor, potentials: Potentials, at: Moment
    ) -> Moved:
        """Move features [B, D] to the prototypes of their labels [B]."""
        columns, rising = self.columns[labels], potentials.ascending
        assignment = class_masked(
            features - self.class_mean[labels],
            labels,
            blocks=self.blocks,
            square_norms=self.block_norms,
            log_mass=self.log_mass[labels],
            potentials=potentials.current[columns],
            ascending=None if rising is None else rising[columns],
            scale=self.scale,
            epsilon=at.epsilon,
            squared=self.squared,
        )
        sent = potentials.sent_within_classes(assignment.ascent, columns, labels, share)
        return Moved(assignment, columns, sent, sent.new_zeros(()))

    def soft_labels(self, moved: Moved, labels: Tensor) -> Tensor:
        """[B, C] soft labels of where the mass went."""
        if self.table.is_dense:
            return block_sums(moved.assignment.plan, self.soft_blocks, labels)
        soft: Tensor = self.table(moved.assignment.plan, moved.ids)
        return soft
