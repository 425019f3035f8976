"""Label alignment with a real gradient: the teacher's head and its soft labels.

The released reference multiplies the teacher's view by a constant, so its label term has no
gradient from the teacher at all; both terms here depend on the teacher's head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Instead of -inf, so that 0 * log p stays 0 for classes that the teacher does not know.
_EXCLUDED = -1e4


def teacher_head_cross_entropy(teacher_logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy of the frozen teacher head read on student features, in nats.

    The gradient flows through the head into the features: they must become features that
    the teacher would classify right (SimKD, Chen et al. 2022, reuses the head likewise).

    Args:
        teacher_logits: [B, C] the teacher's head on the student's features; columns of
            classes that it lacks hold a large negative number.
        labels: [B] int64.
        share: [B] weight of each sample; those of classes that the memory lacks add nothing.
    """
    loss = functional.cross_entropy(teacher_logits.float(), labels, reduction="none")
    return (loss * share).mean()


def soft_label_divergence(
    logits: Tensor, soft_labels: Tensor, share: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """``T^2 KL(q || softmax(logits / T))`` over the classes both sides know.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2; T^2
    keeps the gradient's size independent of the temperature.

    Args:
        logits: [B, C]
        soft_labels: [B, C] teacher's probabilities at ``temperature``, zero where unknown.
        share: [B] weight of each sample; those of classes that the memory lacks add nothing.
        excluded: [C] bool, classes that one side does not know; None if both know all.
        temperature: T.
    """
    scores = exclude_classes(logits.float(), excluded)
    log_p = functional.log_softmax(scores / temperature, dim=1)
    divergence = (torch.xlogy(soft_labels, soft_labels) - soft_labels * log_p).sum(1)
    return temperature**2 * (divergence * share).mean()


def exclude_classes(logits: Tensor, excluded: Tensor | None) -> Tensor:
    """Give the classes ``excluded`` [C] no probability, without infinities."""
    return logits if excluded is None else logits.masked_fill(excluded, _EXCLUDED)
