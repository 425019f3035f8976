"""``cmkd predict-transfer``: which of some teachers will help a student, before it is trained.

The student learns from its labels alone, for as long as its run is to be. On its features, heads
are tried with and without each candidate's soft labels (``diagnostics/trial``), and what these gain
on held-out samples tells what the student would (``diagnostics/forecast``).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.data.sampling import at_most
from cmkd_scale.diagnostics.arrays import Floats
from cmkd_scale.diagnostics.forecast import forecast
from cmkd_scale.diagnostics.trial import Samples, Trial, try_heads
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.bank import PrototypeMemory, load_memory
from cmkd_scale.memory.controls import apply_control
from cmkd_scale.memory.soft_labels import class_soft_labels
from cmkd_scale.memory.sync import gather_sorted
from cmkd_scale.models.model import Model
from cmkd_scale.stages.common import make_spec, start_engine
from cmkd_scale.stages.evaluate import infer
from cmkd_scale.stages.guard import judge
from cmkd_scale.stages.plain import PLAIN_METHOD, mean_features, plain_run, train_plain
from cmkd_scale.stages.runs import open_run, write_json
from cmkd_scale.stages.streams import SplitData, drawn_places, open_quarantine, open_split
from cmkd_scale.stages.through_faults import Recipe, Run
from cmkd_scale.stages.watching import Watch
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

_log = logging.getLogger(__name__)

FILE = "forecast.json"

MOST_CLASSES = 256
"""That heads are tried on; of more, so many are drawn: their cost grows with the number."""
_TRAIN_SAMPLES, _HELD_OUT_SAMPLES = 10, 20  # of a class, at most


def predict_transfer(
    config: Config, memories: Sequence[Path], *, steps: int | None = None, console: bool = True
) -> dict[str, Any]:
    """Rank candidate memories by the gain that they promise; a collective call.

    Args:
        config: of the student; ``run.dir`` keeps what was trained, unset nothing is kept.
        memories: run directories or files of ``cmkd memory``.
        steps: of the training without a teacher; None: ``train.steps``. With few, the student is
            not yet what it would be, and less certain to tell.
        console: show the progress of that training.

    Returns:
        JSON values: the student's accuracy without a teacher, and the candidates, best first, each
        with what the guard says of it (agreement, trust), the trial, gain and interval.

    Raises:
        UsageError: no memory, one that shares no class with the student, or no held-out samples of
            the classes that they share.
        PreemptedError: a signal asked for a stop.
    """
    if not memories:
        raise UsageError("Name the memories to compare: --memory DIR, once for each.")
    loaded = [load_memory(path) for path in memories]
    with ExitStack() as stack:
        if config.run.dir is None:
            if distributed.world_size() > 1:
                raise UsageError("Several processes need a common run.dir=DIR.")
            kept = stack.enter_context(tempfile.TemporaryDirectory(prefix="cmkd-forecast-"))
            config = with_changes(config, {"run.dir": kept})
        engine = start_engine(config)
        preemption = stack.enter_context(Preemption())
        engine.check_batch_size(
            config.train.global_batch_size, config.train.gradient_accumulation_steps
        )
        data = open_split(config, config.data.train_split)
        names = data.label_names
        control = config.method.control
        candidates = [
            align_to_student(apply_control(memory, control, config.run.seed, names), names)
            for memory in loaded
        ]
        directory = open_run(config, "forecast")
        watchdog = stack.enter_context(Watchdog(config.run.watchdog_seconds, directory=directory))
        recipe = Recipe(
            stage="forecast",
            method_name=PLAIN_METHOD,
            method=resolve_method(PLAIN_METHOD, {}),
            feature_dim=config.model.feature_dim or loaded[0].feature_dim,
        )
        spec = make_spec(config, data, recipe.feature_dim)
        run = Run(config, recipe, (), engine, data, spec, directory, Watch(watchdog), console)
        plain = plain_run(run, directory, steps or config.train.steps, recipe.stage)
        model = train_plain(plain, preemption)
        means = mean_features(plain, model, preemption)
        accuracy, train, held_out = _samples(plain, model, preemption)
        results = {
            "stage": "forecast",
            "steps": plain.config.train.steps,
            "accuracy_without_teacher": accuracy,
            "candidates": _ranked(memories, candidates, means, train, held_out),
        }
        distributed.run_on_main(lambda: write_json(directory / FILE, results))
        return results


def _ranked(
    paths: Sequence[Path],
    candidates: Sequence[PrototypeMemory],
    means: Floats,
    train: Samples,
    held_out: Samples,
) -> list[dict[str, Any]]:
    """What there is to say of each memory, the best first; a collective call."""
    rows = []
    for path, candidate in zip(paths, candidates, strict=True):
        if distributed.is_main():
            _log.info(
                "forecast: trying heads on %d training and %d held-out samples with %s",
                len(train.labels),
                len(held_out.labels),
                path,
            )
        trial = _try(candidate, train, held_out)
        if trial is None:
            raise UsageError(
                f"{path}: of the classes that this memory and the student share, none has samples "
                "in both data.train_split and data.validation_split, so nothing can be tried. "
                "Choose another data.validation_split."
            )
        about = {
            "memory": str(path),
            "modality": candidate.provenance.get("modality"),
            **judge(means, candidate).to_json(),
            "trial": asdict(trial),
            **asdict(forecast(trial)),
        }
        rows.append(about)
    return sorted(rows, key=lambda row: (-row["gain"], -_z(row)))


def _z(row: dict[str, Any]) -> float:
    agreement = row["agreement"]
    return float(agreement["z"]) if agreement else -float("inf")


def _try(memory: PrototypeMemory, train: Samples, held_out: Samples) -> Trial | None:
    """Heads with and without what a memory says of the classes that it knows."""
    known = (memory.class_kept > 0).nonzero()[:, 0].numpy()
    classes = np.intersect1d(np.intersect1d(known, train.labels), held_out.labels)
    if not len(classes):
        return None
    soft = class_soft_labels(memory, torch.from_numpy(classes)).double().numpy()
    return try_heads(train.of(classes), held_out.of(classes), soft, memory.temperature)


def _samples(plain: Run, model: Model, preemption: Preemption) -> tuple[float, Samples, Samples]:
    """Held-out accuracy, and features of some training and held-out samples; a collective call."""
    config, seed = plain.config, plain.config.run.seed
    held_out = open_split(config, config.data.validation_split)
    labels, drawn = plain.data.labels, drawn_places(config, plain.data)
    common = np.intersect1d(labels[drawn], held_out.labels[held_out.labelled()])
    if len(common) > MOST_CLASSES:
        common = np.random.default_rng(seed).choice(common, MOST_CLASSES, replace=False)
    passed = partial(
        infer,
        model,
        device=plain.engine.device,
        preemption=preemption,
        watchdog=plain.watch.watchdog,
        step=config.train.steps,
    )

    def gathered(data: SplitData, places: NDArray[np.int64], most: int) -> tuple[float, Samples]:
        quarantine = open_quarantine(
            plain.directory, data, config.data.max_bad_fraction, len(places)
        )
        where, labels, features, logits = passed(data=data, quarantine=quarantine, places=places)
        right = torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(labels))])
        correct, total = distributed.all_reduce_sum(right).tolist()
        of_common = places[np.isin(data.labels[places], common)]
        kept = torch.from_numpy(np.isin(where.numpy(), at_most(data.labels, of_common, most, seed)))
        _, labels, features = gather_sorted(where[kept], labels[kept], features[kept])
        found = Samples(features.double().numpy(), labels.numpy())
        return float(correct) / max(1, int(total)), found

    chosen = at_most(labels, drawn[np.isin(labels[drawn], common)], _TRAIN_SAMPLES, seed)
    _, train = gathered(plain.data, chosen, _TRAIN_SAMPLES)
    accuracy, others = gathered(held_out, held_out.labelled(), _HELD_OUT_SAMPLES)
    return accuracy, train, others
