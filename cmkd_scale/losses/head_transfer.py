"""Head transfer: the student's head starts from the teacher's and is held near it."""

from __future__ import annotations

from torch import Tensor


def head_pull(head_weight: Tensor, teacher_head_weight: Tensor, shared_classes: Tensor) -> Tensor:
    """Squared distance of the student's head to the teacher's, a mean over shared classes.

    L2-SP (Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks", equation 3) on the head.

    Args:
        head_weight: [C, D] the student's.
        teacher_head_weight: [C, D] the frozen teacher's, rows of zeros where unknown.
        shared_classes: [C] bool.
    """
    gap = (head_weight.float() - teacher_head_weight).square().sum(1)
    return (gap * shared_classes).sum() / shared_classes.sum()
