"""``cmkd teacher``: a network learns the teacher's modality from its labels."""

from __future__ import annotations

from typing import Any

from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.stages.common import DEFAULT_FEATURE_DIM
from cmkd_scale.stages.through_faults import Recipe
from cmkd_scale.stages.train import train
from cmkd_scale.training.method_checks import resolve_method

DEFAULT_METHOD = "ce"


def teacher(config: Config, *, console: bool = True) -> dict[str, Any]:
    """Train and evaluate a teacher; returns the content of ``results.json``.

    Raises:
        UsageError: the method is one that has a teacher itself.
    """
    return train(config, teacher_recipe(config), console=console)


def teacher_recipe(config: Config) -> Recipe:
    """What the config asks of a teacher.

    Raises:
        UsageError: see ``teacher``.
    """
    name = config.method.name or DEFAULT_METHOD
    method = resolve_method(name, config.method.weights)
    if method.needs_memory:
        raise UsageError(
            f"method.name={name} learns from a memory, and a teacher is trained by its labels "
            "alone: use method.name=ce, or the verb `cmkd student`."
        )
    return Recipe(
        stage="teacher",
        method_name=name,
        method=method,
        feature_dim=config.model.feature_dim or DEFAULT_FEATURE_DIM,
    )
