"""Tensors derived from a memory, on the training device: never saved, replaced as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cmkd_scale.losses.moments import pooled_moments
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import SoftLabels

_ROWS = 4096  # soft labels are written out for so many prototypes at a time


class MemoryBuffers(nn.Module, ABC):
    """A module whose buffers are computed from a memory by ``layout``."""

    def __init__(self, memory: PrototypeMemory) -> None:
        """Lay out a memory that is aligned to the student's classes."""
        super().__init__()
        for name, value in self.layout(memory).items():
            # Not persistent: the memory has a file of its own, with a digest.
            self.register_buffer(name, value, persistent=False)

    @abstractmethod
    def layout(self, memory: PrototypeMemory) -> dict[str, Tensor]:
        """The buffers by name."""

    def follow(self, memory: PrototypeMemory) -> None:
        """Take up the memory of the same teacher, moved: its prototypes keep their numbers."""
        for name, value in self.layout(memory).items():
            getattr(self, name).copy_(value)


def class_columns(memory: PrototypeMemory) -> tuple[Tensor, Tensor]:
    """[C, K] prototypes of each class side by side, and bool whether there is one.

    K is the widest class's number; shorter ones are filled up with prototype 0.
    """
    counts = torch.bincount(memory.prototype_class, minlength=len(memory.class_names))
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(int(counts.max()))
    filled = place < counts.unsqueeze(1)
    return torch.where(filled, starts.unsqueeze(1) + place, 0), filled


class SoftLabelTable(MemoryBuffers):
    """Soft labels of prototypes, read for plans over any of them."""

    values: Tensor
    listed: Tensor
    rest: Tensor
    shares_rest: Tensor

    def layout(self, memory: PrototypeMemory) -> dict[str, Tensor]:
        """The table as the memory has it, and which classes it is about."""
        # Over few classes the table is a plain one; over many, the likeliest are listed.
        classes = len(memory.class_names)
        self.is_dense = memory.soft_label_values.shape[1] >= classes
        return {
            "values": memory.soft_label_values,
            "listed": memory.soft_label_classes,
            "rest": memory.soft_label_rest,
            # [C + 1] 1 for classes with prototypes; the last is where empty entries point to.
            "shares_rest": (
                torch.bincount(memory.prototype_class, minlength=classes + 1) > 0
            ).float(),
        }

    def forward(self, plan: Tensor, ids: Tensor) -> Tensor:
        """[B, C] soft label of where plan [B, K] sends mass: to the prototypes ids [B, K]."""
        if self.is_dense:
            return torch.bmm(plan.unsqueeze(1), self.values[ids]).squeeze(1)
        rest = plan * self.rest[ids]
        out = rest.sum(1, keepdim=True) * self.shares_rest
        # Listed classes have got the rest, too: replace it.
        classes = self.listed[ids].long()
        listed = plan.unsqueeze(2) * self.values[ids]
        listed -= rest.unsqueeze(2) * self.shares_rest[classes]
        return out.scatter_add_(1, classes.flatten(1), listed.flatten(1))[:, :-1]


def class_soft_labels(memory: PrototypeMemory, shared: Tensor) -> Tensor:
    """[C, C] mean soft label of each class."""
    classes = len(memory.class_names)
    table = torch.zeros(classes, classes)
    for rows in torch.arange(len(memory.prototypes)).split(_ROWS):
        soft = SoftLabels(
            memory.soft_label_values[rows],
            memory.soft_label_classes[rows],
            memory.soft_label_rest[rows],
        )
        weighted = memory.prototype_mass[rows].unsqueeze(1) * soft.dense(shared)
        table.index_add_(0, memory.prototype_class[rows], weighted)
    return table


def pooled_buffers(memory: PrototypeMemory) -> dict[str, Tensor]:
    """Mean [D], covariance [D, D] and variance [D] of all features, classes in equal parts."""
    known = (memory.class_kept > 0).float()
    mean, covariance = pooled_moments(
        memory.class_mean, memory.class_variance, memory.class_factor, known / known.sum()
    )
    return {
        "teacher_mean": mean,
        "teacher_covariance": covariance,
        "teacher_variance": covariance.diagonal().clone(),
    }


def prototype_buffers(memory: PrototypeMemory) -> dict[str, Tensor]:
    """The prototypes [J, D], their classes [J], and masses [J] with classes in equal parts."""
    return {
        "prototypes": memory.prototypes,
        "prototype_class": memory.prototype_class,
        "target_mass": memory.prototype_mass / memory.prototype_mass.sum(),
    }
