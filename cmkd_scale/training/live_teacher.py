"""A teacher whose outputs a method reads sample by sample, beside the student.

Either it runs along on samples of its own, or what it has said of them is read from files. A
frozen one is no part of the module that is trained: neither DDP nor FSDP nor ZeRO sees its
parameters, each process holds it whole, and checkpoints leave it out (its run has it). One that
learns along (C2KD) is a part of the module like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmkd_scale.data.companions import (
    TEACHER_FEATURES,
    TEACHER_INPUTS,
    TEACHER_LABELS,
    TEACHER_LOGITS,
)
from cmkd_scale.errors import UsageError
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput

Values = dict[str, Tensor | tuple[Tensor, ...] | float | None]


class SampleTeacher(nn.Module, ABC):
    """A teacher read in the student's classes; where its outputs come from, subclasses say."""

    provides = frozenset(
        {
            "live_features",
            "live_logits",
            "live_labels",
            "projected",
            "teacher_logits",
            "detached_teacher_logits",
            "excluded",
            "temperature",
        }
    )
    """Values that losses may ask for."""
    reads: tuple[str, ...]
    """Names of what ``forward`` takes, see ``data/companions``."""

    origin: Tensor
    excluded: Tensor | None

    def __init__(
        self,
        teacher_names: Sequence[str],
        student_names: Sequence[str],
        *,
        feature_dim: int,
        temperature: float,
    ) -> None:
        """Match classes by name.

        Args:
            teacher_names: the teacher's classes.
            student_names: the student's classes, in whose order its scores are given.
            feature_dim: width E of the teacher's features.
            temperature: of its soft labels.

        Raises:
            UsageError: the two have no class name in common.
        """
        super().__init__()
        place = {name: index for index, name in enumerate(teacher_names)}
        origin = torch.tensor([place.get(name, -1) for name in student_names])
        if not (origin >= 0).any():
            raise UsageError(
                "The teacher and the student have no class name in common; modalities are joined "
                "by label names alone (data.label_map renames them)."
            )
        self.temperature = temperature
        self.feature_dim = feature_dim
        self.register_buffer("origin", origin.clamp(min=0), persistent=False)
        lacking = origin < 0
        excluded = lacking if bool(lacking.any()) else None
        self.register_buffer("excluded", excluded, persistent=False)

    def read_head(self, features: Tensor) -> Tensor:
        """[B, C] scores of its head for other features [B, E]; no gradient to the head."""
        weight, bias = self._head()
        scores = nn.functional.linear(features, weight.detach(), bias.detach())
        return self._in_student_classes(scores)

    @abstractmethod
    def _head(self) -> tuple[Tensor, Tensor]:
        """Weight [C, E] and bias [C], classes as the teacher has them."""

    def _values(self, features: Tensor, logits: Tensor, labels: Tensor) -> Values:
        return {
            "live_features": features,
            "live_logits": self._in_student_classes(logits),
            "live_labels": labels,
            "excluded": self.excluded,
            "temperature": self.temperature,
        }

    def _in_student_classes(self, logits: Tensor) -> Tensor:
        return exclude_classes(logits[:, self.origin], self.excluded)


class LiveTeacher(SampleTeacher):
    """A teacher's model that runs along."""

    provides = SampleTeacher.provides | {"live_stages"}
    reads = (TEACHER_INPUTS, TEACHER_LABELS)

    def __init__(
        self,
        model: Model,
        teacher_names: Sequence[str],
        student_names: Sequence[str],
        *,
        learns: bool = False,
        temperature: float = 4.0,
    ) -> None:
        """Take the teacher's model.

        Args:
            model: trained, on any device.
            teacher_names: its classes.
            student_names: the student's classes, in whose order its scores are given.
            learns: whether it is trained along.
            temperature: of its soft labels.

        Raises:
            UsageError: the two have no class name in common.
        """
        super().__init__(
            teacher_names,
            student_names,
            feature_dim=model.head.in_features,
            temperature=temperature,
        )
        self.learns = learns
        self._frozen: list[Model] = []  # in a list, so that it is no submodule
        if learns:
            self.model = model
        else:
            self._frozen.append(model.eval().requires_grad_(False))

    def forward(self, inputs: Tensor, labels: Tensor) -> Values:
        """What the teacher says of its own samples [B, ...] with ``labels`` [B]."""
        output = self.model(inputs) if self.learns else self._read(inputs)
        values = self._values(output.features, output.logits, labels)
        return {**values, "live_stages": output.stages}

    def _head(self) -> tuple[Tensor, Tensor]:
        head = (self.model if self.learns else self._frozen[0]).head
        return head.weight, head.bias

    @torch.no_grad()
    def _read(self, inputs: Tensor) -> ModelOutput:
        if next(self._frozen[0].parameters()).device != inputs.device:
            self._frozen[0].to(inputs.device)
        output: ModelOutput = self._frozen[0](inputs)
        return output


class CachedTeacher(SampleTeacher):
    """A frozen teacher whose outputs are read from files.

    They are of its samples as they are: where a live teacher would see augmented ones
    (``data.augment``), this is another method. Without augmentation they differ from a live
    teacher's by the rounding of float32, since a sample's last bits depend on its batch; under
    mixed precision, by that of the live teacher's type.
    """

    reads = (TEACHER_FEATURES, TEACHER_LOGITS, TEACHER_LABELS)

    head_weight: Tensor
    head_bias: Tensor

    def __init__(
        self,
        head_weight: Tensor,
        head_bias: Tensor,
        teacher_names: Sequence[str],
        student_names: Sequence[str],
        *,
        temperature: float = 4.0,
    ) -> None:
        """Take the teacher's head.

        Args:
            head_weight: [C, E] float32
            head_bias: [C] float32
            teacher_names: [C] its classes.
            student_names: the student's classes, in whose order its scores are given.
            temperature: of its soft labels.

        Raises:
            UsageError: the two have no class name in common.
        """
        super().__init__(
            teacher_names,
            student_names,
            feature_dim=head_weight.shape[1],
            temperature=temperature,
        )
        self.register_buffer("head_weight", head_weight, persistent=False)
        self.register_buffer("head_bias", head_bias, persistent=False)

    def forward(self, features: Tensor, logits: Tensor, labels: Tensor) -> Values:
        """What the teacher has said: ``features`` [B, E], ``logits`` [B, C], ``labels`` [B]."""
        return self._values(features, logits, labels)

    def _head(self) -> tuple[Tensor, Tensor]:
        return self.head_weight, self.head_bias
