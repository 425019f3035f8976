"""Null controls: teachers without the knowledge, to tell whether a gain is the teacher's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import SoftLabels, compress, concatenate

_ROWS = 4096  # soft labels are made for so many prototypes at a time


def permuted_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control "is it the teacher's knowledge?": every class takes another's name.

    The permutation is one random cycle, so no class keeps its own statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(memory.class_names), generator=generator).tolist()
    names = list(memory.class_names)
    for place, following in zip(order, order[1:] + order[:1], strict=True):
        names[place] = memory.class_names[following]
    return replace(memory, class_names=tuple(names))


def random_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control of an untrained teacher: random class centres and a random head.

    Scales are kept (spread of the class means, offsets within a class, norm of the head),
    so that only the knowledge is gone. Soft labels are what that head says of its
    prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = memory.class_mean.mean(0)
    spread = memory.class_mean.std(0, correction=0).clamp(min=1e-6)
    noise = torch.randn(memory.class_mean.shape, generator=generator)
    class_mean = centre + noise * spread
    moved = class_mean - memory.class_mean
    prototypes = memory.prototypes + moved[memory.prototype_class]
    weight = torch.randn(memory.head_weight.shape, generator=generator)
    weight = weight * (memory.head_weight.norm() / weight.norm())
    soft = _head_says(prototypes, weight, memory)
    return replace(
        memory,
        prototypes=prototypes,
        class_mean=class_mean,
        head_weight=weight,
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
    )


def apply_control(memory: PrototypeMemory, control: str, seed: int) -> PrototypeMemory:
    """The memory itself (``none``) or its null control (``permuted``, ``random``)."""
    if control == "permuted":
        return permuted_teacher(memory, seed)
    if control == "random":
        return random_teacher(memory, seed)
    return memory


def _head_says(prototypes: Tensor, weight: Tensor, memory: PrototypeMemory) -> SoftLabels:
    keep = memory.soft_label_values.shape[1]
    return concatenate(
        [
            compress(
                torch.softmax((rows @ weight.T + memory.head_bias) / memory.temperature, 1), keep
            )
            for rows in prototypes.split(_ROWS)
        ]
    )
