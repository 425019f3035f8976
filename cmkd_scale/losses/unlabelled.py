"""What a student learns from samples of its own modality that nobody has labelled.

Source-free adaptation has these terms; here the source network's part is the memory's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.label_alignment import exclude_classes, soft_label_divergence


def information_maximisation(logits: Tensor) -> Tensor:
    """``E[H(p)] - H(E[p])`` [] in nats: sure of each sample, undecided over all of them.

    Minus the information between sample and prediction, so between ``-log C`` and 0. SHOT: Liang
    et al., "Do We Really Need to Access the Source Data?" (arXiv 2002.08546), equation 3. The
    second term holds for a batch that is large beside the number of classes and has them in
    about equal parts; with one sample the loss is 0.

    Args:
        logits: [U, C]
    """
    log_p = functional.log_softmax(logits.float(), dim=1)
    conditional = -(log_p.exp() * log_p).sum(1).mean()
    # In logarithms, so that a class that no sample has any probability of has no infinite slope.
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(logits))
    return conditional + (log_mean.exp() * log_mean).sum()


def moment_matching(projected: Tensor, teacher_mean: Tensor, teacher_variance: Tensor) -> Tensor:
    """``(||m - m_T|| + ||v - v_T||) / sqrt(D)`` [] of the batch's mean and variance.

    SOCKET's term of batch-norm statistics (Ahmed et al., "Cross-Modal Knowledge Transfer Without
    Task-Relevant Source Data", ECCV 2022). Departures: the source's statistics are the memory's
    pooled moments in feature space, not those of each batch-norm layer, which need one
    architecture for both modalities; and ``sqrt(D)`` makes the value that of one feature. As in
    batch normalisation, variances are divided by the number of samples.

    Args:
        projected: [U, D] student features in the teacher's space, with gradient.
        teacher_mean: [D]
        teacher_variance: [D]
    """
    x = projected.float()
    mean_gap = x.mean(0) - teacher_mean.float()
    variance_gap = x.var(0, correction=0) - teacher_variance.float()
    gap: Tensor = torch.linalg.vector_norm(mean_gap) + torch.linalg.vector_norm(variance_gap)
    return gap / math.sqrt(x.shape[1])


def pseudo_label_cross_entropy(logits: Tensor, weak_logits: Tensor, *, threshold: float) -> Tensor:
    """Cross-entropy [] of one view against the class that another is sure of, in nats.

    FixMatch: Sohn et al. (arXiv 2001.07685), equation 4. A mean over all samples, not over those
    that pass the threshold: the fewer pass, the less the term weighs.

    Args:
        logits: [U, C] of the strongly augmented view, with gradient.
        weak_logits: [U, C] of the weakly augmented view of the same samples, constants.
        threshold: probability from which a class counts as known.
    """
    confidence, label = torch.softmax(weak_logits.detach().float(), dim=1).max(dim=1)
    loss = functional.cross_entropy(logits.float(), label, reduction="none")
    return (loss * (confidence >= threshold)).mean()


@torch.no_grad()
def centroid_pseudo_labels(features: Tensor, probabilities: Tensor, rounds: int = 1) -> Tensor:
    """[U] int64 class whose centroid has the most similar direction to each sample's features.

    SHOT (Liang et al., arXiv 2002.08546), equations 4 to 6: centroids weighted by probability,
    then ``rounds`` times those of the labels that these give. Deterministic. A class that has no
    mass, in a later round no sample, is not chosen from then on; which of several is chosen whose
    centroids have one direction is not defined. Departure: the released code appends a 1 to every
    feature vector; here, as in the paper, there is none.

    Args:
        features: [U, D]
        probabilities: [U, C] of each class; sums to 1 over classes.
        rounds: how often centroids are taken anew from hard labels.

    Raises:
        UsageError: no class has any mass.
    """
    weights = probabilities.float()
    # Not "none above 0": NaN, of a model that has diverged, is for the loss to show.
    if bool((weights == 0).all()):
        raise UsageError(
            "Pseudo-labels need probabilities, and all of them are 0: pass a softmax of logits."
        )
    directions = functional.normalize(features.float(), dim=1)
    for _ in range(rounds + 1):
        mass = weights.sum(0)
        # A mean, not a sum: where a class has little mass, its length must not vanish.
        centroids = weights.T @ features.float() / mass.clamp(min=1e-30).unsqueeze(1)
        similarity = directions @ functional.normalize(centroids, dim=1).T
        labels = similarity.masked_fill(mass <= 0, -math.inf).argmax(1)
        weights = functional.one_hot(labels, weights.shape[1]).float()
    return labels


def centroid_cross_entropy(logits: Tensor, features: Tensor) -> Tensor:
    """Mean cross-entropy [] with the classes of the nearest centroids (SHOT, equations 4 to 7).

    Departure: centroids are those of the batch, where SHOT computes them over all samples before
    each epoch.

    Args:
        logits: [U, C]
        features: [U, D]
    """
    probabilities = functional.softmax(logits.detach().float(), dim=1)
    labels = centroid_pseudo_labels(features.detach(), probabilities)
    return functional.cross_entropy(logits.float(), labels)


def pseudo_soft_label_divergence(
    logits: Tensor,
    weak_logits: Tensor,
    soft_label_table: Tensor,
    share_of_class: Tensor,
    excluded: Tensor | None,
    temperature: float,
) -> Tensor:
    """``T^2 KL`` [] to the teacher's soft label of the class that a student takes a sample for.

    Self-training (FixMatch, Sohn et al. 2020) with the teacher's class structure: a wrong class is
    mostly one that is alike, and then much of its soft label is right. In the place of a threshold
    each sample counts by the student's probability of that class, which is next to nothing before
    it has learned.

    Args:
        logits: [U, C] of the augmented samples.
        weak_logits: [U, C] of the same samples as they are; without gradient.
        soft_label_table: [C, C] the teacher's mean soft label of each class, at ``temperature``.
        share_of_class: [C] weight of each class; 0 for those that the memory lacks.
        excluded: [C] bool, classes that one side does not know; None if both know all.
        temperature: T.
    """
    scores = exclude_classes(weak_logits.detach().float(), excluded)
    confidence, labels = functional.softmax(scores, dim=1).max(1)
    share = confidence * share_of_class[labels]
    return soft_label_divergence(logits, soft_label_table[labels], share, excluded, temperature)
