"""``cmkd student``: a network learns its modality, aligned to a memory of another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import FILE_NAME, load_memory
from cmkd_scale.stages.common import (
    DEFAULT_FEATURE_DIM,
    Trained,
    load_trained,
    weights_digest,
)
from cmkd_scale.stages.company import Teacher, teacher_width
from cmkd_scale.stages.teacher_cache import open_cached
from cmkd_scale.stages.through_faults import Recipe, alignment_options
from cmkd_scale.stages.train import train
from cmkd_scale.training.alignment_options import check_options
from cmkd_scale.training.method_checks import Offer, check_needs, resolve_method

_log = logging.getLogger(__name__)

DEFAULT_METHOD = "ucmkd_global"


def student(config: Config, *, console: bool = True) -> dict[str, Any]:
    """Train and evaluate a student; returns the content of ``results.json``.

    Raises:
        UsageError: the method needs a memory that is not given, or one that does not fit.
        IntegrityError: the memory, the shards or a checkpoint are damaged.
    """
    return train(config, student_recipe(config), console=console)


def student_recipe(config: Config) -> Recipe:
    """What the config asks of a student, with its memories; a collective call with a live teacher.

    Raises:
        UsageError: see ``student``.
        IntegrityError: a memory or the teacher is damaged.
    """
    name = config.method.name or DEFAULT_METHOD
    method = resolve_method(name, config.method.weights)
    control = config.method.control
    # The width is the memory's even for a method without a teacher, so that the models of a
    # comparison are the same.
    paths = memory_files(config.memory.run)
    memories = [load_memory(path) for path in paths]
    check_needs(
        name,
        method,
        Offer(
            memories=len(memories),
            teacher=config.teacher.run is not None,
            cached=config.teacher.cache is not None,
            mode=config.data.mode,
            unlabelled=config.data.unlabelled != "none",
        ),
    )
    teacher: Teacher | None = None
    if method.live:
        cached = config.teacher.cache is not None
        teacher = open_cached(config) if cached else _live_teacher(config)
    if method.needs_memory:
        check_options(alignment_options(config))
        if config.method.transport == "label_free" and method.reads_soft_labels:
            _log.warning(
                "method.transport=label_free finds prototypes by features alone. Those of an "
                "untrained student find any class, whose soft labels then outvote its true labels "
                "(docs/benchmarks.md, ablation): set method.weights.transported_soft_label=0 and "
                "teacher_head_soft_label=0, or start from a trained student."
            )
    # Of several memories the list of their digests is one, too.
    digest = "+".join(memory.digest() for memory in memories) or None
    width = memories[0].feature_dim if memories else DEFAULT_FEATURE_DIM
    if teacher is not None:
        width = teacher_width(teacher)
    if control != "none" and not method.needs_memory:
        _log.warning("method.control=%s changes nothing: %s has no teacher.", control, name)
    return Recipe(
        stage="student",
        method_name=name if control == "none" or not method.needs_memory else f"{name}/{control}",
        method=method,
        feature_dim=config.model.feature_dim or width,
        memories=tuple(memories) if method.needs_memory else (),
        control=control,
        memory_digest=digest if method.needs_memory else None,
        memory_files=tuple(map(str, paths)) if method.needs_memory else (),
        teacher=teacher,
        guarded=method.needs_memory
        and (method.guarded if config.method.guard is None else config.method.guard),
    )


def _live_teacher(config: Config) -> Trained:
    """The finished teacher of ``teacher.run``; a collective call.

    Raises:
        UsageError: there is none, or processes find different ones.
    """
    teacher = load_trained(Path(str(config.teacher.run)), "teacher")
    if not distributed.same_digest(weights_digest(teacher.model)):
        raise UsageError(
            "The processes find different teachers at teacher.run; give all machines the same run."
        )
    return teacher


def memory_files(run: Path | list[Path] | None) -> list[Path]:
    """The files of ``memory.run``."""
    paths = [] if run is None else run if isinstance(run, list) else [run]
    return [path / FILE_NAME if path.is_dir() else path for path in paths]
