"""``cmkd memory``: the frozen teacher passes once over its shards; prototypes remain."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.files import read_json
from cmkd_scale.memory.bank import (
    FILE_NAME,
    PrototypeMemory,
    load_memory,
    thin_classes,
)
from cmkd_scale.memory.build import build_memory
from cmkd_scale.memory.one_class import Recipe
from cmkd_scale.memory.spool import Spool
from cmkd_scale.stages.common import (
    Trained,
    load_trained,
    open_split_for,
    start_engine,
    weights_digest,
    with_data_of,
)
from cmkd_scale.stages.memory_file import find_finished, save_if_agreed
from cmkd_scale.stages.pass_identity import memory_identity, pass_identity
from cmkd_scale.stages.reading import Start, progress, stop_if_signalled
from cmkd_scale.stages.runs import open_run, write_results
from cmkd_scale.stages.teacher_cache import is_written, open_reading
from cmkd_scale.stages.teacher_pass import PASS, Passed, run_pass
from cmkd_scale.stages.watching import watching
from cmkd_scale.training.preemption import Preemption


def memory(config: Config) -> dict[str, Any]:
    """Build ``run.dir/memory.safetensors`` from ``teacher.run``; returns ``results.json``.

    The shards are ``data.shards``, or those that the teacher was trained on. The digest is
    the same for every number of processes and every order of shards: batches have the same
    samples in any case, and CPUs compute on one thread. A build that was interrupted goes on,
    on any number of processes; where all find the memory that it ends in, that is it. With
    ``teacher.cache``, the teacher's outputs are read from there, and written first if they lack.

    Raises:
        PreemptedError: a signal asked for a stop; what has passed the teacher is kept.
        UsageError: no teacher there, or shards with other labels than its own.
    """
    began = time.perf_counter()
    config.require("teacher.run")
    run = Path(str(config.teacher.run))
    trained = load_trained(run, "teacher")
    _check_finished(trained, run)
    if config.data.shards is None:
        config = with_data_of(trained, config)
    engine = start_engine(config)
    data = open_split_for(trained, config, config.data.train_split)
    held_out = open_split_for(trained, config, config.data.validation_split)
    recipe, previous = _recipe(trained, config)  # first of all, since it may refuse
    directory = open_run(config, "memory")
    identity = pass_identity(trained, data, config)
    provenance = {
        "made_of": memory_identity(identity, held_out, config, previous),
        "teacher_run": str(run),
        "teacher_weights": weights_digest(trained.model),
        "teacher_step": trained.state["step"],
        "modality": trained.spec.modality,
        "prototypes_per_class": config.memory.prototypes_per_class,
        "shards": data.reader.manifest.name,
        "manifest": data.reader.manifest.digest,
        "previous": previous,
    }
    file = directory / FILE_NAME
    result = find_finished(file, provenance["made_of"])
    splits = config.data.train_split, config.data.validation_split
    if result is not None and is_written(config, *splits):
        digest, reused = result.digest(), result.provenance["counts"]["memory/batches"]
    else:
        watched = watching(config, directory, stage="memory", modality=trained.spec.modality)
        with _one_thread(), Preemption() as preemption, watched as watch:
            start = Start(
                trained,
                data,
                held_out,
                config,
                directory,
                engine.device,
                preemption,
                watch.watchdog,
            )
            pairs = zip((data, held_out), splits, strict=True)
            reading, kept_out = (open_reading(start, split, name) for split, name in pairs)
            with progress(f"samples of {data.reader.manifest.name} through the teacher") as tell:
                passed = run_pass(start, reading, kept_out, identity, tell)
            result = _build(passed, recipe, data.label_names, provenance, start)
        digest, reused = save_if_agreed(result, file), passed.reused
    counts = {**result.provenance["counts"], "memory/batches_reused": reused}
    results = write_results(
        directory,
        stage="memory",
        config=config,
        began=began,
        method=None,
        steps=None,
        metrics={**_measures(result), **counts},
        memory_digest=digest,
        memory_file=str(file),
        classes=thin_classes(result),
    )
    Spool(result.feature_dim, directory / PASS).remove()
    return results


def _build(
    passed: Passed,
    recipe: Recipe,
    class_names: Sequence[str],
    provenance: Mapping[str, Any],
    start: Start,
) -> PrototypeMemory:
    """The memory of a pass; a signal ends it between two blocks of classes."""
    with progress("classes into the memory") as tell:

        def after_block(done: int, total: int) -> None:
            tell(done, total)
            start.watchdog.at("exchange", done)
            stop_if_signalled(start.preemption)

        return build_memory(
            passed.spool,
            passed.risk,
            recipe,
            class_names=class_names,
            provenance={**provenance, "counts": passed.counts},
            progress=after_block,
        )


def _recipe(trained: Trained, config: Config) -> tuple[Recipe, str | None]:
    """How each class becomes rows of the memory, and the digest of the memory it follows.

    Raises:
        UsageError: the memory that it is to follow has other classes or another width.
        IntegrityError: that memory is damaged.
    """
    head, settings = trained.model.head, config.memory
    recipe = Recipe(
        head_weight=head.weight.detach().float().cpu(),
        head_bias=head.bias.detach().float().cpu(),
        temperature=settings.temperature,
        prototypes_per_class=settings.prototypes_per_class,
        covariance_rank=settings.covariance_rank,
        seed=config.run.seed,
    )
    if settings.previous is None:
        return recipe, None
    before = load_memory(settings.previous)
    if before.class_names != trained.spec.label_names or before.feature_dim != head.in_features:
        raise UsageError(
            f"memory.previous={settings.previous} has other classes or another feature width than "
            "the teacher, so its prototypes cannot be followed; unset it, or give a memory of the "
            "same teacher at an earlier step."
        )
    recipe = replace(recipe, previous=before)
    return recipe, before.digest()


def _measures(result: PrototypeMemory) -> dict[str, float | int | None]:
    """What there is to say of a memory in numbers; a collective call."""
    known = int((result.class_kept > 0).sum())  # those that have prototypes
    risk = result.class_risk[~result.class_risk.isnan()]
    return {
        "memory/classes": known,
        "memory/prototypes": len(result.prototypes),
        "memory/samples": int(result.class_count.sum()),
        "memory/samples_kept": int(result.class_kept.sum()),
        "memory/mean_radius": float((result.radius * result.prototype_mass).sum()) / max(1, known),
        "memory/peak_resident_bytes": _peak_resident_bytes(),
        # Null if no class has held-out samples.
        "teacher/held_out_cross_entropy": float(risk.mean()) if len(risk) else None,
    }


def _peak_resident_bytes() -> int:
    """Of the largest rank, since it began."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return max(distributed.gather_integers(usage * unit))


def _check_finished(trained: Trained, run: Path) -> None:
    """Refuse a student, or a teacher whose training is not done."""
    done, steps = trained.state["step"], trained.config.train.steps
    if done < steps:
        raise UsageError(
            f"The teacher in {run} is at step {done} of {steps}; finish it with `cmkd teacher` "
            "before building a memory from it."
        )
    if read_json(run / "env.json").get("stage") != "teacher":
        raise UsageError(f"{run} is no run of `cmkd teacher`; set teacher.run to one.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one CPU thread: launchers give processes different numbers of threads, and
    sums of several threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
