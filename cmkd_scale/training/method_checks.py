"""Which methods a run may have: their weights, and what they need against what there is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.losses import LOSSES
from cmkd_scale.training.live_teacher import CachedTeacher, LiveTeacher
from cmkd_scale.training.method import Method
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.targets import MemoryTargets


@dataclass(frozen=True, slots=True)
class Offer:
    """What a run has for a method."""

    memories: int = 0
    teacher: bool = False
    """Whether there is a teacher to run beside the student."""
    cached: bool = False
    """Whether what it says is read from files (``teacher.cache``) instead."""
    mode: str = "unpaired"
    """``data.mode``."""
    unlabelled: bool = False
    """Whether samples without labels are read."""


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
    trains = {"logits", "cohort_logits"}
    on_logits = [name for name in combined if trains & set(LOSSES[name].needs.values())]
    if not any(combined[name] > 0 for name in on_logits):
        raise UsageError(
            f"method.weights leaves nothing that trains the student's head: give one of "
            f"{', '.join(on_logits)} a weight above 0."
        )
    return replace(method, weights=combined)


def check_needs(name: str, method: Method, offer: Offer) -> None:
    """Refuse a method that needs what the run does not have, all reasons at once.

    Raises:
        UsageError: saying what is missing, what needs it, and how to give it.
    """
    reasons = [*_teacher_reasons(method, offer), *_unlabelled_reasons(method, offer)]
    if reasons:
        raise UsageError(
            f"Method '{name}' cannot be run like this: {'; '.join(reasons)}. Without a teacher: "
            "method.name=ce_ls."
        )


def _teacher_reasons(method: Method, offer: Offer) -> list[str]:
    reasons = []
    if method.live:
        if offer.cached:
            reasons += _cache_reasons(method)
        elif not offer.teacher:
            reasons.append(
                f"its {_takers(method, LiveTeacher.provides)} read a teacher that runs beside the "
                "student: set teacher.run to the run directory of `cmkd teacher`"
            )
        if offer.mode not in method.modes:
            reasons.append(
                "it compares each sample with one of the teacher's of the same class, and "
                f"data.mode={offer.mode} draws any: set data.mode={' or '.join(method.modes)}"
            )
    elif method.needs_memory and offer.memories == 0:
        takers = _takers(method, MemoryTargets.provides)
        reasons.append(
            f"its {takers} come from a prototype memory: set memory.run to the run directory of "
            "`cmkd memory`"
        )
    if 0 < offer.memories < method.memories or (offer.memories == 0 < method.memories):
        reasons.append(
            f"it joins {method.memories} teachers, and memory.run names {offer.memories}: give a "
            "list of memories"
        )
    return reasons


def _cache_reasons(method: Method) -> list[str]:
    remedy = "unset teacher.cache, and set teacher.run to the run directory of `cmkd teacher`"
    if method.trains_teacher:
        return [f"it trains its teacher along, and teacher.cache is of a frozen one: {remedy}"]
    lacking = method.values & (LiveTeacher.provides - CachedTeacher.provides)
    if lacking:
        takers = _takers(method, lacking)
        return [f"its {takers} are not in teacher.cache, which holds features and logits: {remedy}"]
    return []


def _unlabelled_reasons(method: Method, offer: Offer) -> list[str]:
    if not method.unlabelled or offer.unlabelled:
        return []
    return [
        "it learns from samples without labels: set data.unlabelled to `rest` (those that "
        "data.n_per_class leaves over, their labels unread) or `unlabelled` (those that have none)"
    ]


def _takers(method: Method, provided: frozenset[str]) -> str:
    """The components that read a teacher, and what of it."""
    found = [
        f"{name} ({', '.join(sorted(taken))})"
        for name in method.components
        if (taken := method.needs & provided & set(LOSSES[name].needs.values()))
    ]
    return ", ".join(found) or "head transfer"
