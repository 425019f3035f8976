"""A short training without a teacher, and where it puts the classes: what teachers are held to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.config import with_changes
from cmkd_scale.data.sampling import at_most
from cmkd_scale.diagnostics.arrays import Floats
from cmkd_scale.diagnostics.structure import class_means
from cmkd_scale.models.model import Model
from cmkd_scale.records import Batch, ModelOutput
from cmkd_scale.stages.common import load_weights
from cmkd_scale.stages.forward_pass import forward_pass
from cmkd_scale.stages.streams import drawn_places, open_quarantine
from cmkd_scale.stages.through_faults import Recipe, Run, train_through_faults
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.preemption import Preemption

PLAIN_METHOD = "ce_ls"

_SAMPLES_A_CLASS = 64  # say where a class's mean is


def plain_run(run: Run, directory: Path, steps: int, stage: str = "guard") -> Run:
    """The same run for some steps without any teacher, by the name of ``stage``."""
    changes = {"run.dir": str(directory), "train.steps": steps, "method.name": PLAIN_METHOD}
    config = with_changes(run.config, {**changes, "method.weights": {}})
    recipe = Recipe(
        stage=stage,
        method_name=PLAIN_METHOD,
        method=resolve_method(PLAIN_METHOD, {}),
        feature_dim=run.recipe.feature_dim,
    )
    return replace(
        run,
        config=config,
        recipe=recipe,
        memories=(),
        directory=directory,
        watch=run.watch.beside(),
    )


def train_plain(plain: Run, preemption: Preemption) -> Model:
    """Train it to its end; a collective call.

    Raises:
        PreemptedError: a signal asked for a stop; the state is saved.
    """
    train_through_faults(plain, preemption)
    model = plain.spec.build()
    load_weights(model, plain.engine.trained_weights())
    return model.to(plain.engine.device)


def mean_features(plain: Run, model: Model, preemption: Preemption) -> Floats:
    """The mean feature [C, D] of each class; NaN without samples. A collective call.

    Of training samples, as there are no others to spare, at most 64 a class.

    Raises:
        PreemptedError: a signal asked for a stop.
    """
    classes = len(plain.spec.label_names)
    drawn = drawn_places(plain.config, plain.data)
    places = at_most(plain.data.labels, drawn, _SAMPLES_A_CLASS, plain.config.run.seed)
    quarantine = open_quarantine(
        plain.directory, plain.data, plain.config.data.max_bad_fraction, len(places)
    )
    sums = torch.zeros(classes, model.head.in_features + 1, dtype=torch.float64)

    def take(where: NDArray[np.int64], batch: Batch, output: ModelOutput) -> None:
        features = output.features.double().cpu()
        rows = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        sums.index_add_(0, batch.labels, rows)

    forward_pass(
        model,
        plain.data,
        places,
        take,
        device=plain.engine.device,
        quarantine=quarantine,
        preemption=preemption,
        watchdog=plain.watch.watchdog,
        phase="guard",
        stopped="Stopped by a signal while the guard compared the student with the teacher. Run "
        "the same command again to continue.",
        step=plain.config.train.steps,
    )
    total = distributed.all_reduce_sum(sums).numpy()
    return class_means(total[:, :-1], total[:, -1].astype(np.int64))
