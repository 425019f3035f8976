"""A run from its beginning or its newest checkpoint to its end, through what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import PrototypeMemory, memory_bytes
from cmkd_scale.monitoring.console import ConsoleSink
from cmkd_scale.monitoring.jsonl import JsonlSink
from cmkd_scale.monitoring.order_log import OrderLogFile, cut_back_all
from cmkd_scale.monitoring.sinks import Sink, Sinks
from cmkd_scale.stages.backbones import weights_directory
from cmkd_scale.stages.common import ModelSpec, Trained
from cmkd_scale.stages.company import (
    Teacher,
    make_cohort,
    make_live,
    make_loader,
    sizes_of,
    teacher_digest,
)
from cmkd_scale.stages.streams import SplitData
from cmkd_scale.stages.watching import Watch
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.checkpoint import Checkpoint, blob_name, load_newest
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.divergence import DivergedError
from cmkd_scale.training.engine import Engine, Options
from cmkd_scale.training.loop import Trainer
from cmkd_scale.training.method import Method
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.targets import MemoryTargets

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a stage decides before the common part begins."""

    stage: str
    method_name: str
    """With its control after a slash, as in ``ucmkd_global/permuted``."""
    method: Method
    feature_dim: int
    memories: tuple[PrototypeMemory, ...] = ()
    """As built, before any control."""
    control: str = "none"
    memory_digest: str | None = None
    """Of the memories as built; of several, one after the other."""
    memory_files: tuple[str, ...] = ()
    teacher: Teacher | None = None
    """That is read sample by sample."""
    guarded: bool = False
    """Whether the guard decides how far each memory is trusted."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is made of, each time that it begins or begins again."""

    config: Config
    recipe: Recipe
    memories: Sequence[PrototypeMemory]
    engine: Engine
    data: SplitData
    spec: ModelSpec
    directory: Path
    watch: Watch
    console: bool
    trust: tuple[float, ...] = ()
    """Of each memory, as the guard has it; empty: full."""


def train_through_faults(run: Run, preemption: Preemption) -> Trainer:
    """Train to the end; where training diverges, from the newest checkpoint on with other data.

    Raises:
        DivergedError: it has diverged too often.
    """
    most = run.config.train.max_rollbacks
    before: Trainer | None = None
    while True:
        trainer, checkpoint = _make_trainer(run, before)
        with _sinks(run, trainer, checkpoint) as sink:
            try:
                trainer.run(sink, preemption)
                return trainer
            except DivergedError as error:
                trainer.restarts["rollback"] += 1
                if trainer.restarts["rollback"] > most:
                    raise DivergedError(
                        f"{error} The run has rolled back {most} times already and stops. Its "
                        "checkpoints are untouched; lower train.learning_rate or "
                        "train.gradient_clip_norm, look at the data, and start again in a new run "
                        "directory."
                    ) from None
                if distributed.is_main():
                    _log.warning(
                        "%s Rolling back to the newest checkpoint, and on with the data after "
                        "those that did it.",
                        error,
                    )
        before = trainer


def _make_trainer(run: Run, before: Trainer | None) -> tuple[Trainer, Path | None]:
    """A trainer that stands where the newest checkpoint ends, and that; a collective call.

    Args:
        run: what it trains.
        before: one that has diverged: what it has read is not read again.
    """
    config, directory = run.config, run.directory
    checkpoints = directory / "checkpoints"
    found = load_newest(checkpoints)
    checkpoint = found[0] if found is not None else None
    _check_newest(checkpoint)
    state = None if checkpoint is None else checkpoint.files
    run.engine.prepare(make_module(run), engine_options(config), state)
    teacher = run.recipe.teacher
    loader = make_loader(config, run.recipe.method, teacher, run.data, directory)
    blobs = {}
    if distributed.is_main():  # which writes checkpoints
        blobs = {
            blob_name(number): memory_bytes(memory) for number, memory in enumerate(run.memories)
        }
    trainer = Trainer(
        run.engine,
        loader,
        config.train,
        checkpoints=checkpoints,
        seed=config.run.seed,
        constants={
            "model": run.spec.to_json(),
            "method": run.recipe.method_name,
            "config_digest": config.digest(),
            "memory_digest": run.recipe.memory_digest,
            "teacher_digest": teacher_digest(teacher),
        },
        blobs=blobs,
        watchdog=run.watch.watchdog,
    )
    if checkpoint is not None:
        trainer.resume(checkpoint.state)
    if before is not None:
        loader.load_state(before.loader.state())
        trainer.restarts = before.restarts
    if config.data.log_order:
        distributed.run_on_main(lambda: cut_back_all(directory, trainer.step))
        trainer.order_log = OrderLogFile(directory, distributed.rank())
    return trainer, None if found is None else found[1]


def _check_newest(found: Checkpoint | None) -> None:
    """Refuse machines that see different checkpoints in the run's directory; a collective call.

    Raises:
        UsageError: on all ranks.
    """
    step = -1 if found is None else int(found.state["step"])
    steps = distributed.gather_integers(step)
    if len(set(steps)) > 1:
        raise UsageError(
            f"The processes find different checkpoints (steps {', '.join(map(str, steps))}; -1 is "
            "none): put run.dir on a file system that all machines share."
        )


def make_module(run: Run) -> Distillation:
    """Model and losses as they begin, on the CPU."""
    config, options = run.config, alignment_options(run.config)
    torch.manual_seed(config.run.seed)
    model = run.spec.build(weights_directory(config.model))
    if config.train.activation_checkpointing:
        model.checkpoint_activations()
    if config.train.compile:
        model.compile_blocks()
    method, teacher = run.recipe.method, run.recipe.teacher
    if "stages" in method.values:
        model.keep_stages()
    if isinstance(teacher, Trained) and "live_stages" in method.values:
        teacher.model.keep_stages()
    targets = [
        MemoryTargets(memory, steps=config.train.steps, options=options, needs=method.needs)
        for memory in run.memories
    ]
    return Distillation(
        model,
        method,
        targets,
        live=make_live(method, teacher, run.spec.label_names),
        cohort=make_cohort(method, run.spec, config),
        sizes=sizes_of(method, model, run.spec, teacher),
        trust=run.trust,
        autocast=run.engine.compute,
    )


def engine_options(config: Config) -> Options:
    """How the config trains a module."""
    return Options(
        global_batch_size=config.train.global_batch_size,
        parts=config.train.gradient_accumulation_steps,
        weight_decay=config.train.weight_decay,
        layer_decay=config.train.layer_decay,
        clip=config.train.gradient_clip_norm,
        ema_decay=config.train.ema_decay,
    )


def alignment_options(config: Config) -> AlignmentOptions:
    """How the config aligns a student to a memory."""
    values = config.method.model_dump()
    return AlignmentOptions(**{f.name: values[f.name] for f in fields(AlignmentOptions)})


@contextmanager
def _sinks(run: Run, trainer: Trainer, checkpoint: Path | None) -> Iterator[Sinks]:
    """What takes steps on this rank."""
    config, watchdog = run.config, run.watch.watchdog
    sinks: list[Sink] = [run.watch.sink(config, trainer, checkpoint)]
    if distributed.is_main():
        sinks.append(JsonlSink(run.directory / "metrics.jsonl", trainer.step))
        if run.console:
            console = ConsoleSink(
                config.train.steps,
                title=f"{run.recipe.stage} {run.recipe.method_name}",
                resume_step=trainer.step,
                run=str(run.directory),
                place=watchdog.beat,
            )
            watchdog.before_end = console.close  # or the terminal would keep its last lines
            sinks.append(console)
    joined = Sinks(sinks)
    try:
        yield joined
    finally:
        joined.close()
        watchdog.before_end = lambda: None
