"""ReviewKD: the student's stages, fused from deep to shallow, against the teacher's.

Chen et al., "Distilling Knowledge via Knowledge Review" (2021, arXiv 2104.09044), sections 3.2
to 3.4. The paper compares maps of one picture. Here row i of the teacher belongs to a sample of
the same class and of another modality, so that places on the two maps do not correspond: the
loss is ill-posed, and is here to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cmkd_scale.losses.sizes import Conv2d, GroupNorm, Sizes, as_map

_WIDEST = 512
"""Channels of fused maps at most, as in the released code."""
_POOLED = (4, 2, 1)
"""Sides of the pooled maps that are compared besides the full one."""


class ReviewKDLoss(nn.Module):
    """Fuse the student's stages and compare each with the teacher's at its level.

    Stages are paired from the deepest; the shorter list decides how many. Departures from the
    released code: GroupNorm in the place of BatchNorm, whose statistics would depend on how a
    batch is split over processes; the mean over the levels, not their sum, so that the weight
    does not depend on how many there are; maps of any shape.
    """

    def __init__(self, sizes: Sizes) -> None:
        """Make a fusion for each pair of stages.

        Args:
            sizes: of the student and its teacher; both have at least one stage.
        """
        super().__init__()
        levels = min(len(sizes.student_stages), len(sizes.teacher_stages))
        student, teacher = sizes.student_stages[-levels:], sizes.teacher_stages[-levels:]
        middle = min(_WIDEST, student[-1])
        self.fusions = nn.ModuleList(
            _Fusion(channels, middle, out, deepest=level == levels - 1)
            for level, (channels, out) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, stages: Sequence[Tensor], live_stages: Sequence[Tensor]) -> Tensor:
        """Mean over the levels of the hierarchical context loss.

        Args:
            stages: of the student, shallow to deep, each [B, Ch, H, W], [B, L, W] or [B, W].
            live_stages: of the teacher, constants, likewise.
        """
        levels = len(self.fusions)
        pairs = zip(self.fusions, stages[-levels:], live_stages[-levels:], strict=True)
        deeper: Tensor | None = None
        losses = []
        for fusion, stage, live_stage in reversed(list(pairs)):
            wanted = as_map(live_stage.detach())
            fused, deeper = fusion(as_map(stage), deeper, (wanted.shape[2], wanted.shape[3]))
            losses.append(hierarchical_context_loss(fused, wanted))
        return torch.stack(losses).mean()


class _Fusion(nn.Module):
    """Attention-based fusion (ABF, section 3.3) of a stage with what came from deeper ones.

    The norms have one group: on a map of one place, smaller groups would leave little contrast.
    """

    def __init__(self, channels: int, middle: int, out: int, *, deepest: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(Conv2d(channels, middle, 1, bias=False), GroupNorm(1, middle))
        self.attention = None if deepest else Conv2d(2 * middle, 2, 1)
        self.widen = nn.Sequential(Conv2d(middle, out, 3, padding=1, bias=False), GroupNorm(1, out))

    def forward(
        self, stage: Tensor, deeper: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The student's map in the teacher's shape, and the fused one for the next stage.

        Args:
            stage: [B, channels, H, W]
            deeper: [B, middle, h, w] fused map of the deeper stages; None for the deepest.
            size: height and width of the teacher's map.
        """
        fused: Tensor = self.narrow(stage)
        if self.attention is not None and deeper is not None:
            deeper = _resized(deeper, (fused.shape[2], fused.shape[3]))
            shares = torch.sigmoid(self.attention(torch.cat([fused, deeper], dim=1)))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        fused = _resized(fused, size)
        return self.widen(fused), fused


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps and of their pooled copies (HCL, section 3.4).

    Copies of side 4, 2 and 1 have weight 1/2, 1/4 and 1/8 beside the full map's 1, and the sum
    is divided by that of the weights, as in the released code; sides that do not shrink a map
    are skipped, there and here. A map that is shorter in one direction keeps that side.

    Args:
        student: [B, Ch, H, W]
        teacher: [B, Ch, H, W]
    """
    height, width = student.shape[2:]
    loss = functional.mse_loss(student, teacher)
    weight = total = 1.0
    for side in _POOLED:
        if side >= max(height, width):
            continue
        size = (min(side, height), min(side, width))
        weight /= 2.0
        total += weight
        loss = loss + weight * functional.mse_loss(
            functional.adaptive_avg_pool2d(student, size),
            functional.adaptive_avg_pool2d(teacher, size),
        )
    return loss / total


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, Ch, H, W] at another size: cells are averaged where it shrinks, repeated where it grows.

    Where it grows by a whole factor, this is interpolation by the nearest neighbour, which the
    released code uses for both.
    """
    return maps if maps.shape[2:] == size else functional.adaptive_avg_pool2d(maps, size)
