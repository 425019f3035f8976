"""A method is data: loss components with their weights, and how the student's head starts.

``METHODS`` is the open table behind ``cmkd methods`` and ``method.name``. Adding a method
is one row; a new loss is one file in ``losses/`` and one row of ``LOSSES``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.losses import LOSSES, STUDENT_PROVIDES


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the method table."""

    summary: str
    weights: Mapping[str, float]
    """Loss component -> weight."""
    head_transfer: bool = False
    """The student's head starts as the teacher's."""
    source: str = ""
    """Paper the method comes from."""

    @property
    def needs(self) -> frozenset[str]:
        """Values that the method's targets must provide."""
        wanted = {
            value
            for name, weight in self.weights.items()
            if weight > 0
            for value in LOSSES[name].needs.values()
        }
        return frozenset(wanted - STUDENT_PROVIDES)

    @property
    def reads_soft_labels(self) -> bool:
        """Whether it learns from the soft labels of where mass is transported to."""
        return "transported_soft_labels" in self.needs

    @property
    def needs_memory(self) -> bool:
        """Whether any term comes from the teacher."""
        return bool(self.needs) or self.head_transfer


METHODS: dict[str, Method] = {
    "ce": Method(
        summary="cross-entropy alone",
        weights={"cross_entropy": 1.0},
    ),
    "ce_ls": Method(
        summary="cross-entropy with label smoothing 0.1: the control of every method",
        weights={"smoothed_cross_entropy": 1.0},
        source="Szegedy et al. 2016",
    ),
    "kd_memory": Method(
        summary="distillation from the memory's mean soft label of the class",
        weights={"smoothed_cross_entropy": 1.0, "class_soft_label": 1.0},
        source="Hinton et al. 2015, soft labels averaged by class",
    ),
    "ucmkd_global": Method(
        summary="transport to the global prototypes, label alignment, head transfer",
        weights={
            "smoothed_cross_entropy": 1.0,
            "transport_cost": 1.0,
            "teacher_head": 1.0,
            "transported_soft_label": 10.0,
            "teacher_head_soft_label": 10.0,
            "head_pull": 0.1,
            "class_bures": 0.0,
        },
        head_transfer=True,
        source="Tran et al. 2026 (UCMKD), made global",
    ),
}


def resolve_method(name: str, weights: Mapping[str, float]) -> Method:
    """The method ``name`` with some of its components weighted otherwise.

    Raises:
        UsageError: unknown method or component, a weight that is no finite number from 0
            on, or none left that trains the head.
    """
    if name not in METHODS:
        raise UsageError(f"method.name '{name}' is unknown; {did_you_mean(name, METHODS)}")
    method = METHODS[name]
    for component, weight in weights.items():
        if component not in method.weights:
            raise UsageError(
                f"method.weights.{component} is not a component of '{name}'; "
                f"{did_you_mean(component, method.weights)}"
            )
        if not 0 <= weight < math.inf:
            raise UsageError(f"method.weights.{component} is {weight}; it must be 0 or more.")
    combined = {**method.weights, **weights}
    on_logits = [name for name in combined if "logits" in LOSSES[name].needs.values()]
    if not any(combined[name] > 0 for name in on_logits):
        raise UsageError(
            f"method.weights leaves nothing that trains the student's head: give one of "
            f"{', '.join(on_logits)} a weight above 0."
        )
    return Method(
        summary=method.summary,
        weights=combined,
        head_transfer=method.head_transfer,
        source=method.source,
    )


def check_needs(name: str, method: Method, provided: frozenset[str]) -> None:
    """Refuse a method whose losses need what its targets do not provide.

    Raises:
        UsageError: naming the loss and the value that is missing.
    """
    for component in method.weights:
        wanted = frozenset(LOSSES[component].needs.values())
        missing = wanted - STUDENT_PROVIDES - provided
        if missing:
            raise UsageError(
                f"Method '{name}' needs {', '.join(sorted(missing))} for its component "
                f"'{component}', which come from a prototype memory: set memory.run to the run "
                "directory of `cmkd memory`, or choose method.name=ce_ls, which has no teacher."
            )
