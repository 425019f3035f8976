"""One training step of the methods that the package is compared with, as their release does it.

Tran et al. 2026 (UCMKD): ``sumall`` adds feature and label alignment to the cross-entropy;
``bilevel`` adapts a copy of the student by both and takes the cross-entropy's gradient there.
Written from the description of the released code, its faults included: transport within the
batch and without labels, autograd through every Sinkhorn iteration, the teacher run in each
step, an inner optimiser that is new each time, and an inner label step on which the teacher has
no influence. Both models may be of any kind with the same feature width D and classes C.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import ot
import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.models.model import Model


@dataclass(frozen=True, slots=True)
class ReferenceOptions:
    """Settings of the release; the defaults are those of its first data set."""

    feature_weight: float = 1.0
    """Of feature alignment, in ``sumall`` alone."""
    label_weight: float = 1.0
    """Of label alignment, in ``sumall`` alone."""
    regularisation: float = 0.1
    """Of Sinkhorn, absolute."""
    iterations: int = 100
    """Of Sinkhorn, at most."""
    inner_feature_steps: int = 1
    inner_label_steps: int = 1
    inner_learning_rate: float = 5e-5
    inner_weight_decay: float = 0.05
    clip: float = 5.0
    """Largest norm of the gradient."""


class PairedBatch(NamedTuple):
    """Samples of both modalities; sample i of one has the class of sample i of the other."""

    student_inputs: Tensor
    """[B, ...]"""
    teacher_inputs: Tensor
    """[B, ...]"""
    labels: Tensor
    """[B] int64"""


def feature_alignment(student: Tensor, teacher: Tensor, options: ReferenceOptions) -> Tensor:
    """Entropic transport cost [] between two batches of features [B, D], cosine cost.

    ``<P, M>`` of Cuturi 2013, with P from POT's iterations and the gradient through them all.
    """
    cost = 1.0 - functional.normalize(student, dim=1) @ functional.normalize(teacher, dim=1).T
    mass = cost.new_full((len(cost),), 1.0 / len(cost))
    value: Tensor = ot.sinkhorn2(
        mass, mass, cost, reg=options.regularisation, numItermax=options.iterations
    )
    return value


def label_alignment(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """``mean(CE(o, y) - kappa CE(t, y))`` [], where kappa is the teacher head's probability of y.

    Written as the release does, ``NLL(log p_S - kappa log p_T)``. Whether the teacher's head
    has a gradient is up to ``teacher_logits``.

    Args:
        logits: o, [B, C] of the student's head.
        teacher_logits: t, [B, C] of the teacher's head on the student's features.
        labels: y, [B] int64.
    """
    log_teacher = functional.log_softmax(teacher_logits, dim=1)
    kappa = log_teacher.gather(1, labels.unsqueeze(1)).exp()
    difference = functional.log_softmax(logits, dim=1) - kappa * log_teacher
    return functional.nll_loss(difference, labels)


def sumall_loss(
    student: Model, teacher: Model, batch: PairedBatch, options: ReferenceOptions
) -> Tensor:
    """Cross-entropy + feature alignment + label alignment [] of a batch.

    The student's features have a gradient through the teacher's head, its parameters have none.
    """
    output = student(batch.student_inputs)
    with torch.no_grad():
        teacher_features = teacher(batch.teacher_inputs).features
    teacher_logits = _head(teacher, output.features)
    loss: Tensor = functional.cross_entropy(output.logits, batch.labels)
    loss = loss + options.feature_weight * feature_alignment(
        output.features, teacher_features, options
    )
    return loss + options.label_weight * label_alignment(
        output.logits, teacher_logits, batch.labels
    )


def sumall_step(
    student: Model,
    teacher: Model,
    optimizer: torch.optim.Optimizer,
    batch: PairedBatch,
    options: ReferenceOptions,
) -> None:
    """One step of ``sumall`` on the student, in place; both models in the mode they are in."""
    optimizer.zero_grad()
    sumall_loss(student, teacher, batch, options).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), options.clip)
    optimizer.step()


def bilevel_step(
    student: Model,
    teacher: Model,
    optimizer: torch.optim.Optimizer,
    batch: PairedBatch,
    options: ReferenceOptions,
) -> None:
    """One step of ``bilevel`` on the student, in place; the adapted copy is thrown away.

    First-order, as in Finn et al. 2017: the gradient at the adapted weights is used as if it
    were the gradient at the student's own.
    """
    adapted = adapt(student, teacher, batch, options)
    adapted.zero_grad()
    functional.cross_entropy(adapted(batch.student_inputs).logits, batch.labels).backward()
    for own, other in zip(student.parameters(), adapted.parameters(), strict=True):
        own.grad = None if other.grad is None else other.grad.clone()
    torch.nn.utils.clip_grad_norm_(student.parameters(), options.clip)
    optimizer.step()
    with torch.no_grad():
        for buffer, copied in zip(student.buffers(), adapted.buffers(), strict=True):
            buffer.copy_(copied)


def adapt(student: Model, teacher: Model, batch: PairedBatch, options: ReferenceOptions) -> Model:
    """A copy of the student after the inner steps: feature alignment, then label alignment.

    The label steps train the head alone, and as the teacher's head is read without gradient,
    they are plain cross-entropy steps.
    """
    adapted = copy.deepcopy(student).train()
    inner = torch.optim.AdamW(
        adapted.parameters(),
        lr=options.inner_learning_rate,
        weight_decay=options.inner_weight_decay,
    )
    for _ in range(options.inner_feature_steps):
        features = adapted(batch.student_inputs).features
        with torch.no_grad():
            teacher_features = teacher(batch.teacher_inputs).features
        inner.zero_grad()
        feature_alignment(features, teacher_features, options).backward()
        inner.step()
    for _ in range(options.inner_label_steps):
        features = adapted(batch.student_inputs).features.detach()
        with torch.no_grad():
            teacher_logits = _head(teacher, features)
        inner.zero_grad()
        label_alignment(adapted.head(features), teacher_logits, batch.labels).backward()
        inner.step()
    return adapted


def _head(teacher: Model, features: Tensor) -> Tensor:
    """The teacher's head [B, C] on other features; a gradient reaches the features alone."""
    head = teacher.head
    return functional.linear(features, head.weight.detach(), head.bias.detach())
