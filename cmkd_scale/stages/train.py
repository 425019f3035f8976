"""Training a model from shards to ``results.json``: what teacher and student have in common."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.memory.controls import apply_control
from cmkd_scale.stages.backbones import keep_files
from cmkd_scale.stages.common import (
    ModelSpec,
    Taught,
    load_weights,
    make_spec,
    projector_of,
    start_engine,
)
from cmkd_scale.stages.evaluate import evaluate_model
from cmkd_scale.stages.guard import guard
from cmkd_scale.stages.runs import open_run, write_results
from cmkd_scale.stages.streams import SplitData, compare_streams, open_split
from cmkd_scale.stages.through_faults import Recipe, Run, train_through_faults
from cmkd_scale.stages.watching import watching
from cmkd_scale.training.preemption import Preemption


def train(config: Config, recipe: Recipe, *, console: bool) -> dict[str, Any]:
    """Train to ``train.steps``, from the newest valid checkpoint if there is one, and evaluate.

    Raises:
        UsageError: see the stages.
        PreemptedError: a signal asked for a stop; the state is saved.
        DivergedError: training has gone wrong more often than it may.
    """
    began = time.perf_counter()
    engine = start_engine(config)  # until ranks have met, a signal may end each at once
    with Preemption() as preemption:
        engine.check_batch_size(
            config.train.global_batch_size, config.train.gradient_accumulation_steps
        )
        data = open_split(config, config.data.train_split)
        test = open_split(config, config.data.test_split)
        check_labels(data, test)
        directory = open_run(config, recipe.stage)
        spec = make_spec(config, data, recipe.feature_dim)
        kept = keep_files(config, spec.backbone, spec.modality, directory)
        spec = replace(spec, backbone=kept)
        memories = taught_memories(config, recipe, spec)
        compare_streams(config, data, recipe.memories, directory, say=console)
        with watching(
            config,
            directory,
            stage=recipe.stage,
            method=recipe.method_name,
            modality=spec.modality,
        ) as watch:
            run = Run(config, recipe, memories, engine, data, spec, directory, watch, console)
            verdicts = guard(run, preemption) if recipe.guarded else []
            run = replace(run, trust=tuple(verdict.trust for verdict in verdicts))
            trainer = train_through_faults(run, preemption)
            watch.watchdog.at("evaluation", trainer.step)
            weights = engine.trained_weights()
            model = spec.build()
            load_weights(model, weights)
            taught_by = [
                Taught(memory, projector_of(weights, number))
                for number, memory in enumerate(memories)
            ]
            metrics = evaluate_model(
                model,
                test,
                engine.device,
                directory,
                taught_by=taught_by,
                preemption=preemption,
                watchdog=watch.watchdog,
                step=trainer.step,
            )
            return write_results(
                directory,
                stage=recipe.stage,
                config=config,
                metrics=metrics,
                began=began,
                method=recipe.method_name,
                steps=trainer.step,
                backend=engine.backend_name,
                restarts=trainer.restarts,
                memory_digest=recipe.memory_digest,
                memory_file=next(iter(recipe.memory_files), None),
                memory_files=list(recipe.memory_files),
                guard=[verdict.to_json() for verdict in verdicts],
            )


def taught_memories(config: Config, recipe: Recipe, spec: ModelSpec) -> list[PrototypeMemory]:
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


def check_labels(data: SplitData, test: SplitData) -> None:
    """Refuse to evaluate on other classes than were trained.

    Raises:
        UsageError: naming both splits.
    """
    if data.label_names != test.label_names:
        raise UsageError(
            f"{data.reader.manifest.address} and {test.reader.manifest.address} have "
            "different label names; build both splits from one data set."
        )
