"""``cmkd student``: a network learns its modality, aligned to a memory of another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cmkd_scale.config import Config
from cmkd_scale.memory.bank import FILE_NAME, apply_control, load_memory
from cmkd_scale.stages.common import DEFAULT_FEATURE_DIM
from cmkd_scale.stages.train import Recipe, train
from cmkd_scale.training.methods import check_needs, resolve_method
from cmkd_scale.training.targets import MemoryTargets

_log = logging.getLogger(__name__)

DEFAULT_METHOD = "ucmkd_global"


def student(config: Config, *, console: bool = True) -> dict[str, Any]:
    """Train and evaluate a student; returns the content of ``results.json``.

    Raises:
        UsageError: the method needs a memory that is not given, or one that does not fit.
        IntegrityError: the memory, the shards or a checkpoint are damaged.
    """
    name = config.method.name or DEFAULT_METHOD
    method = resolve_method(name, config.method.weights)
    control = config.method.control
    # The width is the memory's even for a method without a teacher, so that the models of a
    # comparison are the same.
    path = config.memory.run
    memory = None if path is None else load_memory(path)
    if method.needs_memory:
        check_needs(name, method, frozenset() if memory is None else MemoryTargets.provides)
    digest = None
    file = None
    width = DEFAULT_FEATURE_DIM
    if memory is not None and path is not None:
        width = memory.feature_dim
        digest = memory.digest()
        file = str(Path(path, FILE_NAME) if Path(path).is_dir() else path)
        memory = apply_control(memory, control, config.run.seed)
    if control != "none" and not method.needs_memory:
        _log.warning("method.control=%s changes nothing: %s has no teacher.", control, name)
    recipe = Recipe(
        stage="student",
        method_name=name if control == "none" or not method.needs_memory else f"{name}/{control}",
        method=method,
        feature_dim=config.model.feature_dim or width,
        memory=memory if method.needs_memory else None,
        memory_digest=digest if method.needs_memory else None,
        memory_file=file if method.needs_memory else None,
    )
    return train(config, recipe, console=console)
