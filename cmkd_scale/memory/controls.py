"""Null controls: teachers without the knowledge, to tell whether a gain is the teacher's.

``permuted`` has the teacher's structure under wrong names, ``random`` has none and contradicts
itself, ``orthogonal`` tells all classes apart, surely and consistently, and knows nothing of which
are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.soft_labels import head_says


def permuted_teacher(
    memory: PrototypeMemory, seed: int, student_names: Sequence[str] | None = None
) -> PrototypeMemory:
    """The null control "is it the teacher's knowledge?": every class takes another's name.

    One random cycle over the classes that have prototypes and, given ``student_names``, that the
    student has, too: none of them keeps its own statistics, and the student is taught of the same
    classes as by the memory itself. Other classes keep their names.

    Raises:
        UsageError: there are fewer than two such classes.
    """
    wanted = set(memory.class_names if student_names is None else student_names)
    shared = [
        label
        for label, kept in enumerate(memory.class_kept.tolist())
        if kept > 0 and memory.class_names[label] in wanted
    ]
    if len(shared) < 2:
        raise UsageError(
            f"The permuted control exchanges classes that memory and student share, and there is "
            f"{len(shared)} with samples in the memory. Take method.control=random, or build "
            "the memory from data that has more of the student's classes."
        )
    generator = torch.Generator().manual_seed(seed)
    order = [shared[place] for place in torch.randperm(len(shared), generator=generator).tolist()]
    names = list(memory.class_names)
    for label, following in zip(order, order[1:] + order[:1], strict=True):
        names[label] = memory.class_names[following]
    return replace(memory, class_names=tuple(names))


def random_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control of an untrained teacher: random classes and a random head.

    Kept are names, counts, the number of prototypes of each class, the unit of cost, the
    temperature, and scales: centre and spread of the class means, offsets of prototypes and
    variances within a class, radius, risk and the norm of the head, each pooled over all classes.
    What tells classes apart is drawn or made equal: means, prototypes and head are normal,
    prototypes of a class have equal masses, factors and biases are zero. Soft labels are what
    that head says of its prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    known = memory.class_kept > 0
    means = memory.class_mean[known]
    spread = means.std(0, correction=0).clamp(min=1e-6)
    drawn = torch.randn(memory.class_mean.shape, generator=generator)
    head = torch.randn(memory.head_weight.shape, generator=generator)
    return _made_up(memory, means.mean(0) + spread * drawn, head, generator)


def orthogonal_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control of a sure teacher to whom all classes are equally unlike.

    Class means lie about the memory's centre in orthogonal directions (nearly so where there are
    more classes than dimensions), as far from it as the memory's on average, and the head's rows
    in the same directions. Else as ``random_teacher``.
    """
    generator = torch.Generator().manual_seed(seed)
    known = memory.class_kept > 0
    means = memory.class_mean[known]
    classes, width = memory.class_mean.shape
    directions = torch.randn(max(classes, width), width, generator=generator)
    if classes <= width:
        directions = torch.linalg.qr(directions).Q.T
    directions = torch.nn.functional.normalize(directions[:classes], dim=1)
    radius = (means - means.mean(0)).norm(dim=1).mean()
    return _made_up(memory, means.mean(0) + radius * directions, directions, generator)


def _made_up(
    memory: PrototypeMemory, class_mean: Tensor, head: Tensor, generator: torch.Generator
) -> PrototypeMemory:
    """The memory with other class means [C, D] and a head [C, D] of other directions."""
    known = memory.class_kept > 0
    rows = known.unsqueeze(1)
    class_mean = torch.where(rows, class_mean, 0.0)
    weight = rows * head
    weight = weight * (memory.head_weight[known].norm() / weight.norm())
    bias = torch.zeros_like(memory.head_bias)
    mass = 1.0 / memory.prototype_class.bincount()[memory.prototype_class].float()
    prototypes = class_mean[memory.prototype_class] + _offsets(memory, mass, generator)
    keep = memory.soft_label_values.shape[1]
    soft = head_says(prototypes, weight, bias, memory.temperature, keep=keep, known=known)
    risk = torch.where(memory.class_risk.isnan(), torch.nan, memory.class_risk.nanmean())
    radius = (memory.radius * memory.prototype_mass).sum() / known.sum()
    return replace(
        memory,
        prototypes=prototypes,
        prototype_mass=mass,
        radius=radius.expand(len(mass)).contiguous(),
        class_mean=class_mean,
        class_variance=torch.where(rows, memory.class_variance[known].mean(0), 0.0),
        class_factor=torch.zeros_like(memory.class_factor),
        class_risk=risk,
        head_weight=weight,
        head_bias=bias,
        soft_label_values=soft.values,
        soft_label_classes=soft.classes,
        soft_label_rest=soft.rest,
    )


def apply_control(
    memory: PrototypeMemory,
    control: str,
    seed: int,
    student_names: Sequence[str] | None = None,
) -> PrototypeMemory:
    """The memory itself (``none``) or its null control (``permuted``, ``random``, ``orthogonal``).

    Args:
        memory: as built, before it is aligned to the student's classes.
        control: which one.
        seed: of what is drawn.
        student_names: the student's classes; None for any.

    Raises:
        UsageError: see ``permuted_teacher``.
    """
    if control == "permuted":
        return permuted_teacher(memory, seed, student_names)
    if control == "random":
        return random_teacher(memory, seed)
    if control == "orthogonal":
        return orthogonal_teacher(memory, seed)
    return memory


def _offsets(memory: PrototypeMemory, mass: Tensor, generator: torch.Generator) -> Tensor:
    """[J, D] random offsets of prototypes: of the memory's size, with a mean of 0 in each class."""
    own = memory.prototype_class
    real = memory.prototypes - memory.class_mean[own]
    # As prototypes of a class are about their mean, one a class says nothing of the scale.
    free = max(1, len(own) - len(own.unique()))
    scale = (real.square().sum(0) / free).sqrt()
    drawn = scale * torch.randn(real.shape, generator=generator)
    centre = torch.zeros_like(memory.class_mean)
    centre.index_add_(0, own, mass.unsqueeze(1) * drawn)
    return drawn - centre[own]
