"""What losses with layers of their own share: sizes, the shape of a stage, layers in float32.

Such losses are part of the trained module, so their layers are made from declared sizes before
the first batch. A sharded model gathers weights in the type that it computes in; a loss is
computed in float32 all the same. No layer here mixes the samples of a batch, because its
statistics would depend on how a batch is split over processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of a student and its teacher."""

    classes: int
    """C, of the student."""
    student_dim: int
    """D, width of the student's features."""
    teacher_dim: int
    """E, width of the teacher's features."""
    student_stages: tuple[int, ...]
    """Channels of each stage, shallow to deep: axis 1 of [B, Ch, H, W], the last of [B, L, W]."""
    teacher_stages: tuple[int, ...]
    """The same of the teacher."""


def as_map(stage: Tensor) -> Tensor:
    """Output of a stage as a float32 map [B, channels, height, width].

    A sequence [B, L, W] becomes [B, W, L, 1], a vector [B, W] becomes [B, W, 1, 1].

    Args:
        stage: [B, Ch, H, W], [B, L, W] or [B, W].
    """
    stage = stage.float()
    if stage.dim() == 3:
        return stage.transpose(1, 2).unsqueeze(3)
    return stage[:, :, None, None] if stage.dim() == 2 else stage


class Linear(nn.Linear):
    """A linear layer in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[., in] to [., out]."""
        return functional.linear(inputs.float(), self.weight.float(), _float(self.bias))


class Conv2d(nn.Conv2d):
    """A convolution in float32, with zeros around its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, in, H, W] to [B, out, H', W']."""
        out: Tensor = self._conv_forward(inputs.float(), self.weight.float(), _float(self.bias))
        return out


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[., W] to [., W]."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018) in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, channels, H, W] to the same."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.group_norm(inputs.float(), self.num_groups, weight, bias, self.eps)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
