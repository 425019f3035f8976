"""``cmkd memory``: the frozen teacher passes once over its shards; prototypes remain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.data.order import mix64
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json
from cmkd_scale.memory.bank import FILE_NAME, PrototypeMemory, save_memory
from cmkd_scale.memory.build import TeacherSamples, build_memory
from cmkd_scale.memory.statistics import Moments
from cmkd_scale.monitoring.console import counting
from cmkd_scale.stages.common import (
    Trained,
    load_trained,
    open_split_for,
    start_engine,
    weights_digest,
)
from cmkd_scale.stages.evaluate import infer
from cmkd_scale.stages.runs import open_run, write_results
from cmkd_scale.stages.streams import SplitData, open_quarantine


def memory(config: Config) -> dict[str, Any]:
    """Build ``run.dir/memory.safetensors`` from ``teacher.run``; returns ``results.json``.

    The shards are ``data.shards``, or those that the teacher was trained on. The digest is
    the same for every number of processes: batches have the same samples whatever the world,
    and CPUs compute on one thread.

    Raises:
        UsageError: no teacher there, or shards with other labels than its own.
    """
    began = time.perf_counter()
    config.require("teacher.run")
    run = Path(str(config.teacher.run))
    trained = load_trained(run, "teacher")
    _check_finished(trained, run)
    if config.data.shards is None:
        shards = trained.config.model_dump(mode="json")["data"]
        keys = (
            "shards",
            "modality",
            "source",
            "options",
            "label_map",
            "train_split",
            "validation_split",
        )
        config = with_changes(config, {f"data.{key}": shards[key] for key in keys})
    engine = start_engine(config)
    data = open_split_for(trained, config, config.data.train_split)
    held_out = open_split_for(trained, config, config.data.validation_split)
    directory = open_run(config, "memory")
    fraction = config.data.max_bad_fraction
    skipped = open_quarantine(directory, data, fraction, len(data.labelled()))
    skipped_held_out = open_quarantine(directory, held_out, fraction, len(held_out.labelled()))
    with _one_thread():
        samples = _pass_over(
            trained,
            data,
            held_out,
            config,
            engine.device,
            quarantines=(skipped, skipped_held_out),
        )
        result = build_memory(
            samples,
            class_names=trained.spec.label_names,
            head_weight=trained.model.head.weight,
            head_bias=trained.model.head.bias,
            prototypes_per_class=config.memory.prototypes_per_class,
            temperature=config.memory.temperature,
            seed=config.run.seed,
            provenance={
                "teacher_run": str(run),
                "teacher_weights": weights_digest(trained.model),
                "teacher_step": trained.state["step"],
                "modality": trained.spec.modality,
                "shards": data.reader.manifest.name,
                "manifest": data.reader.manifest.digest,
            },
        )
    file = directory / FILE_NAME
    digest = _save_on_main(result, file)
    return write_results(
        directory,
        stage="memory",
        config=config,
        began=began,
        method=None,
        steps=None,
        metrics={
            **_measures(result),
            "memory/skipped": len(skipped),
            "memory/skipped_held_out": len(skipped_held_out),
        },
        memory_digest=digest,
        memory_file=str(file),
        empty_classes=[
            name
            for name, count in zip(result.class_names, result.class_count, strict=True)
            if count == 0
        ],
    )


def _measures(result: PrototypeMemory) -> dict[str, float | int | None]:
    """What there is to say of a memory in numbers."""
    known = int((result.class_count > 0).sum())
    risk = result.class_risk[~result.class_risk.isnan()]
    return {
        "memory/classes": known,
        "memory/prototypes": len(result.prototypes),
        "memory/samples": int(result.class_count.sum()),
        "memory/mean_radius": float((result.radius * result.prototype_mass).sum()) / max(1, known),
        # Null if no class has held-out samples.
        "teacher/held_out_cross_entropy": float(risk.mean()) if len(risk) else None,
    }


def _save_on_main(result: PrototypeMemory, file: Path) -> str:
    """Write the memory if all ranks have built the same one; returns its digest.

    Raises:
        IntegrityError: they have not.
    """
    digest = result.digest()
    if not distributed.same_digest(digest):
        raise IntegrityError(
            "The ranks have built different memories, so nothing is saved; run all processes on "
            "machines of one kind with equal versions."
        )
    distributed.run_on_main(lambda: save_memory(result, file))
    return digest


def _progress(title: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress on rank 0."""
    return counting(title) if distributed.is_main() else nullcontext(lambda done, total: None)


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


def _pass_over(
    trained: Trained,
    data: SplitData,
    held_out: SplitData,
    config: Config,
    device: torch.device,
    *,
    quarantines: tuple[Quarantine, Quarantine],
) -> TeacherSamples:
    """This rank's share of the teacher's pass over its data; a collective call.

    Raises:
        IntegrityError: more samples of a split are damaged than ``data.max_bad_fraction`` allows.
    """
    model = trained.model.to(device)
    classes = len(data.label_names)
    with _progress(f"samples of {data.reader.manifest.name} through the teacher") as advance:
        places, labels, features, logits = infer(
            model,
            data,
            device,
            quarantine=quarantines[0],
            batch_size=config.memory.batch_size,
            progress=advance,
        )
    quarantines[0].share(data.reader)
    moments = Moments(classes, features.shape[1])
    moments.update(features, labels)
    kept = torch.from_numpy(
        np.isin(places.numpy(), _sample_of_each_class(data, config.memory.max_samples_per_class))
    )
    _, truth, _, scores = infer(
        model,
        held_out,
        device,
        quarantine=quarantines[1],
        batch_size=config.memory.batch_size,
    )
    quarantines[1].share(held_out.reader)
    risk = Moments(classes, 1)
    cross_entropy = functional.cross_entropy(scores.double(), truth, reduction="none")
    risk.update(cross_entropy.unsqueeze(1), truth)
    return TeacherSamples(
        index=places[kept],
        labels=labels[kept],
        features=features[kept],
        logits=logits[kept],
        moments=moments,
        risk=risk,
    )


def _sample_of_each_class(data: SplitData, limit: int) -> NDArray[np.int64]:
    """At most ``limit`` places a class, chosen by a hash of the place: free of ranks."""
    places = data.labelled()
    labels = data.labels[places]
    order = np.lexsort((mix64(places.astype(np.uint64)), labels))
    counts = np.bincount(labels, minlength=len(data.label_names))
    starts = np.cumsum(counts) - counts
    rank_in_class = np.arange(len(places)) - starts[labels[order]]
    chosen: NDArray[np.int64] = places[order[rank_in_class < limit]]
    return chosen


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
