"""Where the teacher's signal comes from: the prototype memory.

Targets turn a batch of student features into the values that losses need. They hold no
trained parameter; their potentials are part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.losses.sinkhorn import annealed_epsilon, semi_dual_plan
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.potentials import Potentials


class MemoryTargets(nn.Module):
    """A memory in the student's class order, ready to be read by batches."""

    provides = frozenset(
        {
            "cost",
            "plan",
            "known",
            "shared_classes",
            "teacher_logits",
            "class_soft_labels",
            "transported_soft_labels",
            "teacher_head_weight",
            "temperature",
        }
    )
    """Values that losses may ask for."""

    shared_classes: Tensor
    prototypes: Tensor
    soft_labels: Tensor
    class_soft_labels: Tensor
    columns: Tensor
    log_mass: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        memory: PrototypeMemory,
        *,
        feature_dim: int,
        steps: int,
        epsilon_start: float,
        epsilon_end: float,
        potential_rate: float,
    ) -> None:
        """Lay the memory out by class.

        Args:
            memory: aligned to the student's class order (``align_to_student``).
            feature_dim: width of the student's features.
            steps: length of the run, for annealing epsilon.
            epsilon_start: entropic regularisation at step 0, in units of the cost scale.
            epsilon_end: the same from half-way on.
            potential_rate: step size of the dual ascent.

        Raises:
            UsageError: the widths of student and memory differ.
        """
        super().__init__()
        if feature_dim != memory.feature_dim:
            raise UsageError(
                f"The student's features are {feature_dim} wide and the memory's "
                f"{memory.feature_dim}; set model.feature_dim={memory.feature_dim} or leave it "
                "unset to take the memory's."
            )
        classes = len(memory.class_names)
        self.steps = steps
        self.epsilon = (epsilon_start, epsilon_end)
        self.temperature = memory.temperature
        self.cost_scale = float(memory.cost_scale)
        self.potentials = Potentials(
            memory.prototype_mass, memory.prototype_class, classes, potential_rate
        )
        columns, log_mass = _layout(memory, classes)
        mean_soft = torch.zeros(classes, classes)
        weighted = memory.prototype_mass.unsqueeze(1) * memory.soft_labels
        mean_soft.index_add_(0, memory.prototype_class, weighted)
        present = torch.bincount(memory.prototype_class, minlength=classes) > 0
        for name, value in {
            "shared_classes": present,
            "prototypes": memory.prototypes,
            "soft_labels": memory.soft_labels,
            "class_soft_labels": mean_soft,
            "columns": columns,
            "log_mass": log_mass,
            "head_weight": memory.head_weight,
            "head_bias": memory.head_bias,
        }.items():
            # Not persistent: the memory has a file of its own, with a digest.
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, features: Tensor, labels: Tensor, step: int
    ) -> tuple[dict[str, Tensor | float], Tensor]:
        """Read the memory for a batch.

        Args:
            features: [B, D] student features, with gradient.
            labels: [B] int64.
            step: for the annealing of epsilon.

        Returns:
            The values named in ``provides``, and this rank's mass received by prototypes and
            classes (see ``Potentials.received``).
        """
        features = features.float()
        known = self.shared_classes[labels]
        columns = self.columns[labels]
        cost = (features.unsqueeze(1) - self.prototypes[columns]).norm(dim=2) / self.cost_scale
        epsilon = annealed_epsilon(step, self.steps, *self.epsilon)
        plan = semi_dual_plan(cost, self.log_mass[labels], self.potentials.value[columns], epsilon)
        teacher_logits = nn.functional.linear(features, self.head_weight, self.head_bias)
        values: dict[str, Tensor | float] = {
            "cost": cost,
            "plan": plan,
            "known": known,
            "shared_classes": self.shared_classes,
            "teacher_logits": exclude_classes(teacher_logits, self.shared_classes),
            "class_soft_labels": self.class_soft_labels[labels],
            "transported_soft_labels": torch.einsum("bk,bkc->bc", plan, self.soft_labels[columns]),
            "teacher_head_weight": self.head_weight,
            "temperature": self.temperature,
        }
        return values, self.potentials.received(plan, columns, labels, known)


def _layout(memory: PrototypeMemory, classes: int) -> tuple[Tensor, Tensor]:
    """Prototypes of each class side by side: columns [C, K] and log masses [C, K].

    Classes with fewer than K prototypes are filled up with prototype 0 at mass zero.
    """
    counts = torch.bincount(memory.prototype_class, minlength=classes)
    widest = int(counts.max())
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(widest)
    valid = place < counts.unsqueeze(1)
    columns = torch.where(valid, starts.unsqueeze(1) + place, 0)
    log_mass = memory.prototype_mass.log()[columns].masked_fill(~valid, float("-inf"))
    return columns, log_mass
