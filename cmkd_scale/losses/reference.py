"""Label terms of the released reference, faults included, and the same with a gradient.

Tran et al. 2026 (UCMKD) bound the student's risk by a label-alignment gap ``l_S - kappa l_T``,
where ``l`` are cross-entropies and kappa is the probability that the teacher's head gives the true
class on the student's features. In the released inner steps ``kappa l_T`` is a constant: the
teacher has no influence on the gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cmkd_scale.losses.classification import SMOOTHING


def label_gap(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """``mean(l_S - kappa l_T)`` in nats; gradients flow through whatever has one.

    With ``teacher_logits`` that have a gradient, minimising it makes ``kappa l_T`` larger: the
    features become wrong for the teacher's head (``sumall`` of the release).

    Args:
        logits: [B, C] of the student's head; label smoothing 0.1 as on the release's first data
            set.
        teacher_logits: [B, C] of the teacher's head on the student's features.
        labels: [B] int64.
    """
    own = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=SMOOTHING)
    log_kappa = -functional.cross_entropy(teacher_logits, labels, reduction="none")
    return (own + log_kappa.exp() * log_kappa).mean()


def constant_label_gap(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The same with the teacher's part as a constant: the released inner step."""
    return label_gap(logits, teacher_logits.detach(), labels)


def taught_label_gap(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """``mean(l_S + l_T)``: both heads are to be right on the student's features.

    What the bound asks for and the release lacks: a gradient through the teacher's head into the
    features, of the right sign.

    Args:
        logits: [B, C] of the student's head.
        teacher_logits: [B, C] of the teacher's head on the student's features, with gradient.
        labels: [B] int64.
    """
    own = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    return own + functional.cross_entropy(teacher_logits, labels)
