"""Contrast of student features with the memory's prototypes: those of the class attract."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def prototype_contrast(
    projected: Tensor,
    labels: Tensor,
    prototypes: Tensor,
    prototype_class: Tensor,
    share: Tensor,
    *,
    temperature: float = 0.07,
    adaptive: bool = True,
) -> Tensor:
    """Mean over the class's prototypes of ``-log softmax_j(cos(z_i, t_j) / tau_ij)`` [], in nats.

    Contrastive semantic calibration of Xia et al., "Robust Cross-Modal Knowledge Distillation
    for Unconstrained Videos" (arXiv 2304.07775). Departures: the contrast set is the memory's
    prototypes, not the teacher features of the batch, so that every class is in it and no pairs
    are needed; and the released temperature ``cos + 0.07``, which is negative or 0 for dissimilar
    samples, is ``temperature + (1 + cos) / 2``, positive throughout. Like theirs it is a constant,
    so that it cannot be learnt, and higher for what is already alike, whose pull is thus softer.

    With ``adaptive=False`` every tau is ``temperature``: supervised contrast, Khosla et al.,
    "Supervised Contrastive Learning" (arXiv 2004.11362), equation 2, against a bank.

    Args:
        projected: [B, D] student features in the teacher's space, with gradient.
        labels: [B] int64.
        prototypes: [J, D] constants.
        prototype_class: [J] int64 class of each prototype.
        share: [B] weight of each sample; those of classes that the memory lacks add nothing.
        temperature: lowest tau.
        adaptive: whether tau grows with similarity.
    """
    directions = functional.normalize(prototypes.detach().float(), dim=1)
    similarity = functional.normalize(projected.float(), dim=1) @ directions.T
    tau = temperature + (1.0 + similarity.detach()) / 2 if adaptive else temperature
    log_p = functional.log_softmax(similarity / tau, dim=1)
    positive = labels.unsqueeze(1) == prototype_class
    # A class without prototypes has a sum of 0, and stays 0.
    attraction = (log_p * positive).sum(1) / positive.sum(1).clamp(min=1)
    return -(attraction * share).mean()
