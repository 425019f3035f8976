"""Losses, one family a file, and the open table ``LOSSES``.

A loss takes tensors by name and returns a scalar; ``needs`` names what it takes. Most are pure
functions; one with parameters of its own is a module that ``build`` makes, and is trained and
saved with the student. What is available is stated by the student (``OWN_VALUES``) and by the
teacher of the method; the two are compared when the configuration is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from cmkd_scale.losses.c2kd import C2KDLoss
from cmkd_scale.losses.classification import cross_entropy, smoothed_cross_entropy
from cmkd_scale.losses.contrast import prototype_contrast
from cmkd_scale.losses.feature_alignment import gaussian_distance, transport_cost
from cmkd_scale.losses.head_transfer import head_pull
from cmkd_scale.losses.label_alignment import soft_label_divergence, teacher_head_cross_entropy
from cmkd_scale.losses.logit_distillation import (
    column_correlation_distance,
    live_soft_label_divergence,
    non_target_class_divergence,
    row_correlation_distance,
    target_class_divergence,
)
from cmkd_scale.losses.minibatch_transport import deepjdot, jumbot, reference_transport
from cmkd_scale.losses.moments import coral, mmd
from cmkd_scale.losses.mutual import (
    cohort_cross_entropy,
    cohort_teacher_class,
    mutual_divergence,
)
from cmkd_scale.losses.norm import NormLoss
from cmkd_scale.losses.reference import constant_label_gap, label_gap, taught_label_gap
from cmkd_scale.losses.relational import relative_angle, relative_distance
from cmkd_scale.losses.review_kd import ReviewKDLoss
from cmkd_scale.losses.sizes import Sizes
from cmkd_scale.losses.unlabelled import (
    centroid_cross_entropy,
    information_maximisation,
    moment_matching,
    pseudo_label_cross_entropy,
    pseudo_soft_label_divergence,
)

__all__ = ["LOSSES", "OWN_VALUES", "UNLABELLED_VALUES", "Loss", "Sizes"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A row of ``LOSSES``: keyword argument of ``function`` -> name of the value it takes."""

    function: Callable[..., Tensor]
    needs: dict[str, str]
    build: Callable[[Sizes], nn.Module] | None = None
    """Makes what is called in the place of ``function``, if it has parameters."""

    @property
    def by_teacher(self) -> bool:
        """Whether it is computed once for each teacher, from what that provides."""
        return not OWN_VALUES.issuperset(self.needs.values())


def _same(*names: str, **others: str) -> dict[str, str]:
    return {**{name: name for name in names}, **others}


def _with_parameters(build: Callable[[Sizes], nn.Module], *names: str) -> Loss:
    def needs_building(**values: object) -> Tensor:
        raise TypeError(f"{build} is a module: it is built, not called, from the table")

    return Loss(needs_building, _same(*names), build)


UNLABELLED_VALUES = frozenset(
    {
        "unlabelled_logits",
        "unlabelled_weak_logits",
        "unlabelled_features",
        "unlabelled_projected",
    }
)
"""Values of a stream of samples without labels: U rows each."""

OWN_VALUES = frozenset(
    {
        "features",
        "logits",
        "labels",
        "stages",
        "head_weight",
        "detached_logits",
        "cohort_logits",
        *(UNLABELLED_VALUES - {"unlabelled_projected"}),
    }
)
"""Values that a student offers to a loss without any teacher."""

_SOFT = _same("share", "excluded", "temperature")
_LIVE_LOGITS = _same("logits", "live_logits", "excluded", "temperature")
_MINIBATCHES = _same("projected", "live_features")

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, _same("logits", "labels")),
    "smoothed_cross_entropy": Loss(smoothed_cross_entropy, _same("logits", "labels")),
    # From a prototype memory.
    "transport_cost": Loss(transport_cost, _same("transported", "share")),
    "class_bures": Loss(gaussian_distance, _same("bures", "share")),
    "teacher_head": Loss(teacher_head_cross_entropy, _same("teacher_logits", "labels", "share")),
    "class_soft_label": Loss(
        soft_label_divergence, {**_SOFT, **_same("logits", soft_labels="class_soft_labels")}
    ),
    "transported_soft_label": Loss(
        soft_label_divergence, {**_SOFT, **_same("logits", soft_labels="transported_soft_labels")}
    ),
    "teacher_head_soft_label": Loss(
        soft_label_divergence,
        {**_SOFT, **_same(logits="teacher_logits", soft_labels="transported_soft_labels")},
    ),
    "head_pull": Loss(head_pull, _same("head_weight", "teacher_head_weight", "class_share")),
    "coral": Loss(coral, _same("projected", "teacher_mean", "teacher_covariance")),
    "mmd": Loss(mmd, _same("projected", "prototypes", "target_mass")),
    "prototype_contrast": Loss(
        prototype_contrast, _same("projected", "labels", "prototypes", "prototype_class", "share")
    ),
    "plain_prototype_contrast": Loss(
        partial(prototype_contrast, adaptive=False),
        _same("projected", "labels", "prototypes", "prototype_class", "share"),
    ),
    # From a teacher that runs beside the student.
    "live_soft_label": Loss(live_soft_label_divergence, _LIVE_LOGITS),
    "target_class": Loss(target_class_divergence, {**_LIVE_LOGITS, "labels": "labels"}),
    "non_target_class": Loss(non_target_class_divergence, {**_LIVE_LOGITS, "labels": "labels"}),
    "row_correlation": Loss(row_correlation_distance, _LIVE_LOGITS),
    "column_correlation": Loss(column_correlation_distance, _LIVE_LOGITS),
    "relative_distance": Loss(relative_distance, _same("features", "live_features")),
    "relative_angle": Loss(relative_angle, _same("features", "live_features")),
    "c2kd": _with_parameters(
        C2KDLoss, "logits", "live_logits", "stages", "live_stages", "labels", "excluded"
    ),
    "review_kd": _with_parameters(ReviewKDLoss, "stages", "live_stages"),
    "norm": _with_parameters(NormLoss, "features", "live_features"),
    "minibatch_transport": Loss(reference_transport, _MINIBATCHES),
    "jumbot": Loss(jumbot, {**_MINIBATCHES, **_same("logits", "live_labels")}),
    "deepjdot": Loss(deepjdot, {**_MINIBATCHES, **_same("logits", "live_labels")}),
    "label_gap": Loss(label_gap, _same("logits", "teacher_logits", "labels")),
    "constant_label_gap": Loss(
        constant_label_gap,
        _same("labels", logits="detached_logits", teacher_logits="detached_teacher_logits"),
    ),
    "taught_label_gap": Loss(taught_label_gap, _same("logits", "teacher_logits", "labels")),
    # Among several students.
    "cohort_cross_entropy": Loss(cohort_cross_entropy, _same("cohort_logits", "labels")),
    "cohort_teacher_class": Loss(cohort_teacher_class, _same("cohort_logits", "live_logits")),
    "mutual_divergence": Loss(mutual_divergence, _same(logits_of="cohort_logits")),
    # Of samples without labels.
    "information_maximisation": Loss(information_maximisation, _same(logits="unlabelled_logits")),
    "centroid_pseudo_label": Loss(
        centroid_cross_entropy, _same(logits="unlabelled_logits", features="unlabelled_features")
    ),
    "pseudo_label": Loss(
        partial(pseudo_label_cross_entropy, threshold=0.8),
        _same(logits="unlabelled_logits", weak_logits="unlabelled_weak_logits"),
    ),
    "pseudo_soft_label": Loss(
        pseudo_soft_label_divergence,
        _same(
            "soft_label_table",
            "share_of_class",
            "excluded",
            "temperature",
            logits="unlabelled_logits",
            weak_logits="unlabelled_weak_logits",
        ),
    ),
    "moment_matching": Loss(
        moment_matching,
        _same("teacher_mean", "teacher_variance", projected="unlabelled_projected"),
    ),
}
