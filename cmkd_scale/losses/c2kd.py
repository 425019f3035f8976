"""C2KD: student and teacher train together and talk through proxies.

Huo et al., "C2KD: Bridging the Modality Gap for Cross-Modal Knowledge Distillation" (CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.losses.sizes import LayerNorm, Linear, Sizes, as_map

_SLOPE = 0.1
"""Of the proxies' LeakyReLU where it leaks."""
_COMPARED_AT_ONCE = 1 << 22
"""Numbers that one step of the rank correlation holds."""


class C2KDLoss(nn.Module):
    """The whole loss of student and teacher, both of which it trains.

    A proxy reads the deepest stage of each network. Per sample, as the released code has it:

        cross-entropy of both networks
        + KL both ways between each network and its own proxy
        + KL both ways between the two proxies over the classes other than the label, for
          samples on which the proxies rank the classes alike (Kendall's tau above 0)

    In each KL the first argument, the target, is a constant. Departures from the released code:

    - Proxies have LayerNorm, not BatchNorm: a batch's statistics would depend on how it is split
      over processes.
    - The label's class is taken out of the non-target KL. The released code sets its logit to 0
      on both sides, which leaves it a probability.
    - Classes that one side does not know take part in nothing between the two; a sample of such
      a class has no teacher sample of its class, so it trains its own network and proxy only.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Make the proxies.

        Args:
            sizes: of the student and its teacher; both have at least one stage.
        """
        super().__init__()
        self.student_proxy = _make_proxy(sizes.student_stages[-1], sizes.classes)
        self.teacher_proxy = _make_proxy(sizes.teacher_stages[-1], sizes.classes)

    def forward(
        self,
        logits: Tensor,
        live_logits: Tensor,
        stages: Sequence[Tensor],
        live_stages: Sequence[Tensor],
        labels: Tensor,
        excluded: Tensor | None,
    ) -> Tensor:
        """Mean over the batch, in nats.

        Args:
            logits: [B, C] of the student.
            live_logits: [B, C] of the teacher, with gradient, in the student's class order.
            stages: of the student, shallow to deep, each [B, Ch, H, W], [B, L, W] or [B, W].
            live_stages: of the teacher, likewise, with gradient.
            labels: [B] int64, of student and teacher samples.
            excluded: [C] bool, classes that one side does not know; None if both know all.
        """
        student = logits.float()
        teacher = exclude_classes(live_logits.float(), excluded)
        student_proxy = self.student_proxy(as_map(stages[-1]).mean((2, 3)))
        teacher_proxy = self.teacher_proxy(as_map(live_stages[-1]).mean((2, 3)))
        known = _known(labels, excluded)
        alone = (
            functional.cross_entropy(student, labels, reduction="none")
            + _both_ways(student, student_proxy)
            + known * functional.cross_entropy(teacher, labels, reduction="none")
            + _both_ways(teacher, exclude_classes(teacher_proxy, excluded))
        )
        selected = known * _alike(student_proxy, teacher_proxy, excluded)
        is_label = torch.arange(student.shape[1], device=labels.device) == labels.unsqueeze(1)
        left_out = is_label if excluded is None else is_label | excluded
        between = _both_ways(
            exclude_classes(student_proxy, left_out), exclude_classes(teacher_proxy, left_out)
        )
        loss: Tensor = (alone + selected * between).mean()
        return loss


@torch.no_grad()
def kendall_tau(first: Tensor, second: Tensor) -> Tensor:
    """[B] Kendall's rank correlation tau-b of the rows of two [B, C]; 0 for rows all equal.

    Kendall, "The treatment of ties in ranking problems" (1945). All pairs of classes are
    compared, O(B C^2) numbers, a part of them at a time.
    """
    batch, classes = first.shape
    rows = max(1, _COMPARED_AT_ONCE // max(1, batch * classes))
    agreement, untied_first, untied_second = first.new_zeros(3, batch).unbind()
    for part in torch.arange(classes, device=first.device).split(rows):
        x = torch.sign(first[:, part].unsqueeze(2) - first.unsqueeze(1))
        y = torch.sign(second[:, part].unsqueeze(2) - second.unsqueeze(1))
        agreement += (x * y).sum((1, 2))
        untied_first += x.abs().sum((1, 2))
        untied_second += y.abs().sum((1, 2))
    return agreement / (untied_first.sqrt() * untied_second.sqrt()).clamp(min=1.0)


def _make_proxy(channels: int, classes: int) -> nn.Sequential:
    """From a pooled stage [B, channels] to scores [B, C]."""
    return nn.Sequential(
        Linear(channels, channels, bias=False),
        LayerNorm(channels),
        nn.LeakyReLU(_SLOPE),
        Linear(channels, classes),
    )


def _known(labels: Tensor, excluded: Tensor | None) -> Tensor:
    """[B] 1.0 for samples of a class that both sides know."""
    if excluded is None:
        return torch.ones(len(labels), device=labels.device)
    return (~excluded[labels]).float()


def _alike(student_proxy: Tensor, teacher_proxy: Tensor, excluded: Tensor | None) -> Tensor:
    """[B] 1.0 where both proxies rank the classes alike: on-the-fly selection."""
    first, second = student_proxy.detach(), teacher_proxy.detach()
    if excluded is not None:
        # Left in, they would come last on both sides: an agreement that says nothing.
        first, second = first[:, ~excluded], second[:, ~excluded]
    return (kendall_tau(first, second) > 0.0).float()


def _both_ways(first: Tensor, second: Tensor) -> Tensor:
    """[B] KL of each from the other as a constant target."""
    return _divergence(first, second) + _divergence(second, first)


def _divergence(target: Tensor, scores: Tensor) -> Tensor:
    """[B] KL(softmax(target) || softmax(scores)), the target a constant."""
    log_q = functional.log_softmax(target.detach(), dim=1)
    log_p = functional.log_softmax(scores, dim=1)
    return functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
