"""What a method is: losses with their weights, where its teacher is, how its steps are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cmkd_scale.losses import LOSSES, OWN_VALUES, UNLABELLED_VALUES

Update = Literal["joint", "bilevel"]

CLASS_MATCHED = ("class_matched", "paired")
ANY_MODE = ("unpaired", "class_matched", "paired")


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
    departs: str = ""
    """Where it is not what the paper has."""
    modes: tuple[str, ...] = ()
    """Of ``data.mode``: how samples of a teacher that runs beside the student may be drawn, the
    usual one first; empty for methods that need no such teacher."""
    memories: int = 0
    """Memories at least, where the method needs more than one."""
    trains_teacher: bool = False
    """The teacher is trained along."""
    students: int = 1
    """Students that learn together; the first is the result."""
    update: Update = "joint"
    """``bilevel``: the gradient is that of a copy which the ``inner`` components have adapted."""
    inner: tuple[tuple[str, int], ...] = ()
    """Component and number of steps, in order."""
    inner_learning_rate: float = 0.0
    inner_weight_decay: float = 0.0
    guarded: bool = False
    """The guard decides how far the teacher is trusted, unless ``method.guard`` says otherwise."""

    @property
    def components(self) -> tuple[str, ...]:
        """All losses that are computed."""
        outer = [name for name, weight in self.weights.items() if weight > 0]
        return (*outer, *(name for name, _ in self.inner))

    @property
    def values(self) -> frozenset[str]:
        """All values that its losses take."""
        return frozenset(v for name in self.components for v in LOSSES[name].needs.values())

    @property
    def needs(self) -> frozenset[str]:
        """Values that its teacher must provide."""
        return self.values - OWN_VALUES

    @property
    def reads_soft_labels(self) -> bool:
        """Whether it learns from the soft labels of where mass is transported to."""
        return "transported_soft_labels" in self.needs

    @property
    def live(self) -> bool:
        """Whether a teacher runs beside the student."""
        return bool(self.modes)

    @property
    def needs_memory(self) -> bool:
        """Whether any term comes from a prototype memory."""
        return not self.live and (bool(self.needs) or self.head_transfer)

    @property
    def unlabelled(self) -> bool:
        """Whether it learns from samples without labels, too."""
        return bool(self.values & UNLABELLED_VALUES)

    @property
    def mode(self) -> str:
        """The usual ``data.mode``; empty where there is no choice."""
        return self.modes[0] if self.modes else ""
