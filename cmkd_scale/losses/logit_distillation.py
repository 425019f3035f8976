"""Distillation from the logits of a live teacher, which sees a sample of its own.

Row i of the teacher's logits belongs to a sample of the same class as row i of the student's
batch, not to the same sample: class-matched, where the papers have pairs. The teacher's side is
a constant in every function. ``excluded`` are the classes that one side does not know: they get
no probability on either.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cmkd_scale.losses.label_alignment import exclude_classes

_FLAT = 1e-6
"""Deviation of probabilities from their mean, as a length, below which float32 sees none."""


def live_soft_label_divergence(
    logits: Tensor, live_logits: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """``T^2 KL(p_T || p_S)`` of softened probabilities, mean over the batch, in nats.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2; T^2 keeps
    the gradient's size independent of the temperature.

    Args:
        logits: [B, C] of the student.
        live_logits: [B, C] of the teacher, in the student's class order.
        excluded: [C] bool; None if both know all classes.
        temperature: T.
    """
    student, teacher = _scores(logits, live_logits, excluded, temperature)
    return temperature**2 * _divergence(
        functional.log_softmax(student, dim=1), functional.log_softmax(teacher, dim=1)
    )


def target_class_divergence(
    logits: Tensor,
    live_logits: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    temperature: float,
) -> Tensor:
    """``T^2 KL(b_T || b_S)`` of the probabilities (of the label, of all the rest), in nats.

    TCKD of Zhao et al., "Decoupled Knowledge Distillation" (2022, arXiv 2203.08679), equations
    4 to 6. A sample's divergence of all classes is ``TCKD + (1 - p_T(label)) NCKD``.

    Args:
        logits: [B, C] of the student.
        live_logits: [B, C] of the teacher, in the student's class order.
        labels: [B] int64
        excluded: [C] bool; None if both know all classes.
        temperature: T.
    """
    student, teacher = _scores(logits, live_logits, excluded, temperature)
    return temperature**2 * _divergence(_log_binary(student, labels), _log_binary(teacher, labels))


def non_target_class_divergence(
    logits: Tensor,
    live_logits: Tensor,
    labels: Tensor,
    excluded: Tensor | None,
    temperature: float,
) -> Tensor:
    """``T^2 KL(p_T || p_S)`` among all classes but the label, in nats.

    NCKD of Zhao et al. (2022, arXiv 2203.08679), equations 4 to 6; equation 7 gives it a weight
    of its own, because beside a sure teacher ``1 - p_T(label)`` lets nothing of it through.

    Args:
        logits: [B, C] of the student.
        live_logits: [B, C] of the teacher, in the student's class order.
        labels: [B] int64
        excluded: [C] bool; None if both know all classes.
        temperature: T.
    """
    student, teacher = _scores(logits, live_logits, excluded, temperature)
    return temperature**2 * _divergence(_log_others(student, labels), _log_others(teacher, labels))


def row_correlation_distance(
    logits: Tensor, live_logits: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """``T^2 (1 - Pearson)`` of a sample's probabilities over the classes, mean over the batch.

    Inter-class relation of DIST, Huang et al., "Knowledge Distillation from A Stronger Teacher"
    (2022, arXiv 2205.10536), equations 8 and 9; T^2 as in the released code, which counts a row
    without variation as uncorrelated: here it is left out, because there is nothing to match.

    Args:
        logits: [B, C] of the student.
        live_logits: [B, C] of the teacher, in the student's class order.
        excluded: [C] bool; None if both know all classes.
        temperature: T.
    """
    student, teacher = _probabilities(logits, live_logits, excluded, temperature)
    shift = _mean_probability(student, excluded)
    return temperature**2 * _correlation_distance(student - shift, teacher - shift, dim=1)


def column_correlation_distance(
    logits: Tensor, live_logits: Tensor, excluded: Tensor | None, temperature: float
) -> Tensor:
    """``T^2 (1 - Pearson)`` of a class's probabilities over the batch, mean over the classes.

    Intra-class relation of DIST (arXiv 2205.10536), equations 10 and 11; T^2 as in the released
    code, which counts a class without variation as uncorrelated: here it is left out. Hence
    excluded classes add nothing, and a batch of one sample gives 0.

    With class-matched samples, classes still vary together over the batch, because row i has
    the same label on both sides; what varies within a class does not.

    Args:
        logits: [B, C] of the student.
        live_logits: [B, C] of the teacher, in the student's class order.
        excluded: [C] bool; None if both know all classes.
        temperature: T.
    """
    student, teacher = _probabilities(logits, live_logits, excluded, temperature)
    return temperature**2 * _correlation_distance(
        student - student.mean(0), teacher - teacher.mean(0), dim=0
    )


def _scores(
    logits: Tensor, live_logits: Tensor, excluded: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Softened logits of student and teacher over the classes that both know."""
    student = exclude_classes(logits.float(), excluded)
    teacher = exclude_classes(live_logits.detach().float(), excluded)
    return student / temperature, teacher / temperature


def _probabilities(
    logits: Tensor, live_logits: Tensor, excluded: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    student, teacher = _scores(logits, live_logits, excluded, temperature)
    return torch.softmax(student, dim=1), torch.softmax(teacher, dim=1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(q || p)``, mean over the batch."""
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _is_label(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, C] bool, true at each sample's label."""
    return torch.arange(scores.shape[1], device=scores.device) == labels.unsqueeze(1)


def _log_binary(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, 2] log of the probabilities of the label and of all the rest.

    The rest is summed, not taken as 1 - p, which is 0 in float32 for a sure network.
    """
    log_p = functional.log_softmax(scores, dim=1)
    label = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    rest = torch.logsumexp(exclude_classes(log_p, _is_label(log_p, labels)), dim=1)
    return torch.stack([label, rest], dim=1)


def _log_others(scores: Tensor, labels: Tensor) -> Tensor:
    """[B, C] log of the probabilities among all classes but the label."""
    return functional.log_softmax(exclude_classes(scores, _is_label(scores, labels)), dim=1)


def _mean_probability(p: Tensor, excluded: Tensor | None) -> Tensor:
    """[C] mean of a row over the classes that both know, and 0 for the others.

    A row sums to 1 over the classes that both know, so its mean is known.
    """
    if excluded is None:
        return p.new_full((p.shape[1],), 1.0 / p.shape[1])
    known = (~excluded).float()
    return known / known.sum().clamp(min=1.0)


def _correlation_distance(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """1 - Pearson along ``dim`` of what has mean 0 there, mean over where both vary."""
    squares = torch.stack([x.square().sum(dim), y.square().sum(dim)])
    vary = (squares > _FLAT**2).all(0)
    # Set to 1 before the root: its slope at 0 is infinite, and 0 times infinity is NaN.
    lengths = squares.masked_fill(~vary, 1.0).sqrt().prod(0)
    distance = 1.0 - (x * y).sum(dim) / lengths
    return distance.masked_fill(~vary, 0.0).sum() / vary.sum().clamp(min=1)
