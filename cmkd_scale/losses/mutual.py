"""Students that teach each other: what several of them on the same samples disagree about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.classification import cross_entropy, smoothed_cross_entropy


def mutual_divergence(logits_of: Sequence[Tensor]) -> Tensor:
    """``1/K sum_k 1/(K - 1) sum_(j != k) KL(p_j || p_k)`` [], in nats, a mean over the batch.

    Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), for K students, as Thoker and Gall,
    "Cross-modal Knowledge Distillation for Action Recognition" (2019) use it. The teacher p_j of
    each pair is a constant. Departure: divided by K, so that the weight of the term does not
    depend on the number of students. 0, without gradient, for one student.

    Args:
        logits_of: K tensors [B, C], a student each, for the same samples.

    Raises:
        UsageError: there is no student.
    """
    if not logits_of:
        raise UsageError("Mutual learning needs students: pass the logits of one or more.")
    scores = torch.stack([functional.log_softmax(logits.float(), dim=1) for logits in logits_of])
    students, batch, _ = scores.shape
    if students == 1:
        return scores.new_zeros(())
    log_teachers = scores.detach().unsqueeze(1)
    # [K, K, B]; a student's divergence from itself is 0 and has no slope.
    divergence = (log_teachers.exp() * (log_teachers - scores)).sum(3)
    return divergence.sum() / (students * (students - 1) * batch)


def cohort_cross_entropy(cohort_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Sum over K students of the smoothed cross-entropy [] with the labels [B]."""
    losses = [smoothed_cross_entropy(logits, labels) for logits in cohort_logits]
    return torch.stack(losses).sum()


def cohort_teacher_class(cohort_logits: Sequence[Tensor], live_logits: Tensor) -> Tensor:
    """Sum over K students of the cross-entropy [] with the class that the teacher says.

    Thoker and Gall 2019 take this, not a divergence from soft scores, as the teacher's term.

    Args:
        cohort_logits: K tensors [B, C].
        live_logits: [B, C] of the teacher, for samples of the same classes.
    """
    return torch.stack(
        [cross_entropy(logits, live_logits.argmax(1)) for logits in cohort_logits]
    ).sum()
