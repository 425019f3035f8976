"""Pure losses, one family a file, and the open table ``LOSSES``.

A loss takes tensors by name and returns a scalar; ``needs`` names what it takes. What is
available is stated by the student (``STUDENT_PROVIDES``) and by the targets of the method;
the two are compared when the configuration is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cmkd_scale.losses.classification import cross_entropy, smoothed_cross_entropy
from cmkd_scale.losses.feature_alignment import gaussian_distance, transport_cost
from cmkd_scale.losses.head_transfer import head_pull
from cmkd_scale.losses.label_alignment import soft_label_divergence, teacher_head_cross_entropy


@dataclass(frozen=True, slots=True)
class Loss:
    """A row of ``LOSSES``: keyword argument of ``function`` -> name of the value it takes."""

    function: Callable[..., Tensor]
    needs: dict[str, str]

    @property
    def by_teacher(self) -> bool:
        """Whether it is computed once for each memory, from what that provides."""
        return not STUDENT_PROVIDES.issuperset(self.needs.values())


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


STUDENT_PROVIDES = frozenset({"features", "logits", "labels", "stages", "head_weight"})
"""Values that any student offers to a loss."""

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, _same("logits", "labels")),
    "smoothed_cross_entropy": Loss(smoothed_cross_entropy, _same("logits", "labels")),
    "transport_cost": Loss(transport_cost, _same("transported", "share")),
    "class_bures": Loss(gaussian_distance, _same("bures", "share")),
    "teacher_head": Loss(teacher_head_cross_entropy, _same("teacher_logits", "labels", "share")),
    "class_soft_label": Loss(
        soft_label_divergence,
        {
            **_same("logits", "share", "excluded", "temperature"),
            "soft_labels": "class_soft_labels",
        },
    ),
    "transported_soft_label": Loss(
        soft_label_divergence,
        {
            **_same("logits", "share", "excluded", "temperature"),
            "soft_labels": "transported_soft_labels",
        },
    ),
    "teacher_head_soft_label": Loss(
        soft_label_divergence,
        {
            **_same("share", "excluded", "temperature"),
            "logits": "teacher_logits",
            "soft_labels": "transported_soft_labels",
        },
    ),
    "head_pull": Loss(head_pull, _same("head_weight", "teacher_head_weight", "class_share")),
}
