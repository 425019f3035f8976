"""A teacher that runs beside the student, for methods that need its outputs sample by sample.

A frozen one is no part of the module that is trained: neither DDP nor FSDP nor ZeRO sees its
parameters, each process holds it whole, and checkpoints leave it out (its run has it). One that
learns along (C2KD) is a part of the module like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.models.model import Model
from cmkd_scale.records import ModelOutput

Values = dict[str, Tensor | tuple[Tensor, ...] | float | None]


class LiveTeacher(nn.Module):
    """A teacher's model, read in the student's classes."""

    provides = frozenset(
        {
            "live_features",
            "live_logits",
            "live_labels",
            "live_stages",
            "projected",
            "teacher_logits",
            "detached_teacher_logits",
            "excluded",
            "temperature",
        }
    )
    """Values that losses may ask for."""

    origin: Tensor
    excluded: Tensor | None

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
        super().__init__()
        place = {name: index for index, name in enumerate(teacher_names)}
        origin = torch.tensor([place.get(name, -1) for name in student_names])
        if not (origin >= 0).any():
            raise UsageError(
                "The teacher and the student have no class name in common; modalities are joined "
                "by label names alone (data.label_map renames them)."
            )
        self.learns = learns
        self.temperature = temperature
        self.feature_dim = model.head.in_features
        self.register_buffer("origin", origin.clamp(min=0), persistent=False)
        lacking = origin < 0
        excluded = lacking if bool(lacking.any()) else None
        self.register_buffer("excluded", excluded, persistent=False)
        self._frozen: list[Model] = []  # in a list, so that it is no submodule
        if learns:
            self.model = model
        else:
            self._frozen.append(model.eval().requires_grad_(False))

    def forward(self, inputs: Tensor, labels: Tensor) -> Values:
        """What the teacher says of its own samples [B, ...] with ``labels`` [B]."""
        output = self.model(inputs) if self.learns else self._read(inputs)
        return {
            "live_features": output.features,
            "live_logits": self._in_student_classes(output.logits),
            "live_labels": labels,
            "live_stages": output.stages,
            "excluded": self.excluded,
            "temperature": self.temperature,
        }

    def read_head(self, features: Tensor) -> Tensor:
        """[B, C] scores of its head for other features [B, E]; no gradient to the head."""
        head = (self.model if self.learns else self._frozen[0]).head
        scores = nn.functional.linear(features, head.weight.detach(), head.bias.detach())
        return self._in_student_classes(scores)

    @torch.no_grad()
    def _read(self, inputs: Tensor) -> ModelOutput:
        if next(self._frozen[0].parameters()).device != inputs.device:
            self._frozen[0].to(inputs.device)
        output: ModelOutput = self._frozen[0](inputs)
        return output

    def _in_student_classes(self, logits: Tensor) -> Tensor:
        return exclude_classes(logits[:, self.origin], self.excluded)
