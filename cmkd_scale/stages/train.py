"""Training a model from shards to ``results.json``: what teacher and student have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory, memory_bytes
from cmkd_scale.memory.controls import apply_control
from cmkd_scale.monitoring.sinks import ConsoleSink, JsonlSink, PrometheusSink, Sinks
from cmkd_scale.stages.common import ModelSpec, Taught, make_spec, start_engine
from cmkd_scale.stages.evaluate import evaluate_model
from cmkd_scale.stages.runs import open_run, write_results
from cmkd_scale.stages.streams import (
    SplitData,
    compare_streams,
    make_train_loader,
    open_split,
)
from cmkd_scale.training.alignment_options import AlignmentOptions
from cmkd_scale.training.checkpoint import blob_name, load_newest
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine
from cmkd_scale.training.loop import Trainer
from cmkd_scale.training.methods import Method
from cmkd_scale.training.targets import MemoryTargets


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


def train(config: Config, recipe: Recipe, *, console: bool) -> dict[str, Any]:
    """Train to ``train.steps``, from the newest valid checkpoint if there is one, and evaluate.

    Raises:
        UsageError: see the stages.
        PreemptedError: a signal asked for a stop; the state is saved.
    """
    began = time.perf_counter()
    engine = start_engine(config)
    engine.check_batch_size(config.train.global_batch_size)
    data = open_split(config, config.data.train_split)
    test = open_split(config, config.data.test_split)
    _check_labels(data, test)
    directory = open_run(config, recipe.stage)
    spec = make_spec(config, data, recipe.feature_dim)
    memories = _memories(config, recipe, spec)
    trainer = _make_trainer(config, recipe, memories, engine, data, spec, directory)
    compare_streams(config, data, recipe.memories, directory, say=console)
    found = load_newest(directory / "checkpoints")
    if found is not None:
        trainer.resume(found[0])
    sinks: list[Sinks] = []

    def make_sink(resume_step: int) -> Sinks | None:
        if distributed.is_main():
            title = f"{recipe.stage} {recipe.method_name}"
            sinks.append(_make_sinks(config, directory, spec, title, resume_step, console))
            return sinks[0]
        return None

    try:
        trainer.run(make_sink)
    finally:
        for sink in sinks:
            sink.close()
    module = engine.module
    pairs = zip(memories, module.projectors, strict=True)
    taught_by = [Taught(memory, projector) for memory, projector in pairs]
    metrics = evaluate_model(module.model, test, engine.device, directory, taught_by=taught_by)
    return write_results(
        directory,
        stage=recipe.stage,
        config=config,
        metrics=metrics,
        began=began,
        method=recipe.method_name,
        steps=trainer.step,
        memory_digest=recipe.memory_digest,
        memory_file=next(iter(recipe.memory_files), None),
        memory_files=list(recipe.memory_files),
    )


def _memories(config: Config, recipe: Recipe, spec: ModelSpec) -> list[PrototypeMemory]:
    """The memories that the student is taught by, in its classes; a collective call.

    Raises:
        UsageError: ranks have read different ones, or there is none that fits.
    """
    digest = hashlib.sha256(str(recipe.memory_digest).encode()).hexdigest()
    if not distributed.same_digest(digest):
        raise UsageError(
            "The processes find different memories at memory.run; give all machines the same file."
        )
    return [
        align_to_student(
            apply_control(memory, recipe.control, config.run.seed + number, spec.label_names),
            spec.label_names,
        )
        for number, memory in enumerate(recipe.memories)
    ]


def _make_trainer(
    config: Config,
    recipe: Recipe,
    memories: Sequence[PrototypeMemory],
    engine: Engine,
    data: SplitData,
    spec: ModelSpec,
    directory: Path,
) -> Trainer:
    """Model, losses and loader of a run that stands at step 0."""
    torch.manual_seed(config.run.seed)
    model = spec.build()
    blobs = {}
    if distributed.is_main():  # which writes checkpoints
        blobs = {blob_name(number): memory_bytes(memory) for number, memory in enumerate(memories)}
    options = alignment_options(config)
    targets = [
        MemoryTargets(memory, steps=config.train.steps, options=options, needs=recipe.method.needs)
        for memory in memories
    ]
    engine.prepare(
        Distillation(model, recipe.method, targets),
        learning_rate=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
    )
    return Trainer(
        engine,
        make_train_loader(config, data, directory),
        config.train,
        checkpoints=directory / "checkpoints",
        seed=config.run.seed,
        constants={
            "model": spec.to_json(),
            "method": recipe.method_name,
            "config_digest": config.digest(),
            "memory_digest": recipe.memory_digest,
        },
        blobs=blobs,
    )


def alignment_options(config: Config) -> AlignmentOptions:
    """How the config aligns a student to a memory."""
    values = config.method.model_dump()
    return AlignmentOptions(**{f.name: values[f.name] for f in fields(AlignmentOptions)})


def _make_sinks(
    config: Config, directory: Path, spec: ModelSpec, title: str, resume_step: int, console: bool
) -> Sinks:
    sinks: list[Any] = [JsonlSink(directory / "metrics.jsonl", resume_step)]
    if console:
        sinks.append(ConsoleSink(config.train.steps, title=title, resume_step=resume_step))
    if config.monitor.prometheus_port is not None:
        sinks.append(
            PrometheusSink(
                config.monitor.prometheus_port,
                address=config.monitor.prometheus_address,
                modality=spec.modality,
                resume_step=resume_step,
            )
        )
    return Sinks(sinks)


def _check_labels(data: SplitData, test: SplitData) -> None:
    if data.label_names != test.label_names:
        raise UsageError(
            f"{data.reader.manifest.address} and {test.reader.manifest.address} have "
            "different label names; build both splits from one data set."
        )
