"""A memory in a student's classes: names are all that joins two modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import SoftLabels, compress, concatenate

_ROWS = 4096  # soft labels are written out for so many prototypes at a time
_LEAST = 1e-6  # probability of the classes in common, below which it says nothing of them


def align_to_student(memory: PrototypeMemory, student_names: Sequence[str]) -> PrototypeMemory:
    """Bring a memory into a student's classes and their order.

    Classes that only the teacher knows are dropped and soft labels renormalised over the
    rest. Classes that only the student knows, or of which no sample was kept (the teacher's data
    lacked them, or they were damaged), have counts of 0, no prototypes, and a head row of zeros.

    Raises:
        UsageError: the two have no class name in common.
    """
    # A class without prototypes has a name but no knowledge.
    source = {
        name: index
        for index, (name, kept) in enumerate(
            zip(memory.class_names, memory.class_kept.tolist(), strict=True)
        )
        if kept > 0
    }
    origin = torch.tensor([source.get(name, -1) for name in student_names])
    known = origin >= 0
    if not known.any():
        raise UsageError(
            "The memory and the student's shards have no class name in common (memory: "
            f"{_examples(memory.class_names)}; student: {_examples(student_names)}). Modalities "
            "are joined by label names alone: rebuild one of them with the other's names."
        )
    if known.all() and tuple(student_names) == memory.class_names:
        return memory
    target = torch.full((len(memory.class_names),), -1)
    target[origin[known]] = torch.arange(len(student_names))[known]
    new_class = target[memory.prototype_class]
    # Prototypes in the order of the student's classes: equal names give equal bytes.
    kept = torch.argsort(new_class, stable=True)
    kept = kept[new_class[kept] >= 0]
    soft = _in_student_classes(memory, kept, origin, new_class[kept])
    return replace(
        memory,
        class_names=tuple(student_names),
        prototypes=memory.prototypes[kept],
        prototype_class=new_class[kept],
        prototype_mass=memory.prototype_mass[kept],
        radius=memory.radius[kept],
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
        class_mean=_rows(memory.class_mean, origin, fill=0.0),
        class_variance=_rows(memory.class_variance, origin, fill=0.0),
        class_factor=_rows(memory.class_factor, origin, fill=0.0),
        class_count=_rows(memory.class_count, origin, fill=0),
        class_kept=_rows(memory.class_kept, origin, fill=0),
        class_risk=_rows(memory.class_risk, origin, fill=float("nan")),
        head_weight=_rows(memory.head_weight, origin, fill=0.0),
        head_bias=_rows(memory.head_bias, origin, fill=0.0),
    )


def _in_student_classes(
    memory: PrototypeMemory, kept: Tensor, origin: Tensor, own: Tensor
) -> SoftLabels:
    """Soft labels of the prototypes ``kept``, over the classes that both sides know.

    Where next to nothing was said of these classes, all goes to the prototype's own: what is left
    of a sure teacher's error is rounding, and would be blown up to a soft label.
    """
    everything = torch.ones(len(memory.class_names), dtype=torch.bool)
    keep = memory.soft_label_values.shape[1]
    parts = []
    for rows, labels in zip(kept.split(_ROWS), own.split(_ROWS), strict=True):
        soft = SoftLabels(
            memory.soft_label_values[rows],
            memory.soft_label_classes[rows],
            memory.soft_label_rest[rows],
        )
        taken = _rows(soft.dense(everything).T, origin, fill=0.0).T
        total = taken.sum(1, keepdim=True)
        certain = functional.one_hot(labels, len(origin)).to(taken.dtype)
        taken = torch.where(total < _LEAST, certain, taken / total.clamp(min=_LEAST))
        parts.append(compress(taken.contiguous(), keep, known=origin >= 0))
    return concatenate(parts)


def _rows(values: Tensor, origin: Tensor, fill: float) -> Tensor:
    taken = values[origin.clamp(min=0)].clone()
    taken[origin < 0] = fill
    return taken


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, ... ({len(names)} classes)" if len(names) > 3 else shown
