"""Head transfer: the student's head starts from the teacher's and is held near it."""

from __future__ import annotations

from torch import Tensor


def head_pull(head_weight: Tensor, teacher_head_weight: Tensor, class_share: Tensor) -> Tensor:
    """Squared distance of the student's head to the teacher's, a mean over shared classes.

    L2-SP (Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks", equation 3) on the head.

    Args:
        head_weight: [C, D] the student's.
        teacher_head_weight: [C, D] the frozen teacher's, in the student's feature space; rows
            of zeros where unknown.
        class_share: [C] weight of each class, which sums to 1.
    """
    gap = (head_weight.float() - teacher_head_weight).square().sum(1)
    return (gap * class_share).sum()
