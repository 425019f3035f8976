"""``cmkd evaluate``: accuracy of a trained model on a split, each sample counted once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.diagnostics.bound import memory_bound
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.memory.nearest import nearest
from cmkd_scale.memory.sync import gather_sorted
from cmkd_scale.models.model import Model
from cmkd_scale.records import Batch, ModelOutput
from cmkd_scale.stages.common import Taught, load_trained, open_split_for, start_engine
from cmkd_scale.stages.forward_pass import forward_pass
from cmkd_scale.stages.runs import write_file, write_results
from cmkd_scale.stages.streams import SplitData, open_quarantine
from cmkd_scale.stages.watching import watching
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

_NEIGHBOURS = 8  # prototypes that vote on a class
_COMPARISONS = ("nearest_prototype", "knn", "teacher_head")
_BOUND_SAMPLES = 20_000  # at most; they say of each class enough, in a minute
_NEIGHBOURHOOD = 0.1  # in units of the cost scale: so much farther, a vote counts 1/e


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate the newest checkpoint of ``run.dir`` on ``data.test_split``.

    Writes ``evaluation.json`` and ``predictions.safetensors`` into the run directory.

    Raises:
        UsageError: there is no trained model, or the split has other labels than it.
        PreemptedError: a signal asked for a stop.
    """
    began = time.perf_counter()
    engine = start_engine(config)
    with Preemption() as preemption:
        config.require("run.dir")
        directory = Path(str(config.run.dir))
        trained = load_trained(directory, "student")
        data = open_split_for(trained, config, config.data.test_split)
        with watching(
            config,
            directory,
            stage="evaluate",
            method=trained.state["method"],
            modality=trained.spec.modality,
        ) as watch:
            metrics = evaluate_model(
                trained.model,
                data,
                engine.device,
                directory,
                taught_by=trained.taught_by,
                preemption=preemption,
                watchdog=watch.watchdog,
            )
            return write_results(
                directory,
                stage="evaluate",
                config=config,
                metrics=metrics,
                began=began,
                name="evaluation.json",
                steps=trained.state["step"],
                method=trained.state["method"],
                memory_digest=trained.state["memory_digest"],
                split=config.data.test_split,
            )


def infer(
    model: Model,
    data: SplitData,
    device: torch.device,
    *,
    quarantine: Quarantine,
    preemption: Preemption,
    watchdog: Watchdog,
    places: NDArray[np.int64] | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass this rank's share of samples, by default all labelled ones, through a model.

    A collective call.

    Returns:
        Places [n] int64, labels [n], features [n, D] and logits [n, C] on the CPU.

    Raises:
        PreemptedError: on all ranks: one was signalled.
        IntegrityError: more of the samples are damaged than allowed.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def take(where: NDArray[np.int64], batch: Batch, output: ModelOutput) -> None:
        features, logits = output.features.float().cpu(), output.logits.float().cpu()
        parts.append((torch.from_numpy(where), batch.labels, features, logits))

    forward_pass(
        model,
        data,
        data.labelled() if places is None else places,
        take,
        device=device,
        quarantine=quarantine,
        preemption=preemption,
        watchdog=watchdog,
        phase="evaluation",
        stopped="Stopped by a signal during the evaluation. What was trained is saved; run the "
        "same command again, and it is evaluated afresh.",
        step=step,
    )
    if not parts:
        # More ranks than batches: an empty share with the right widths.
        head = model.head
        empty = torch.zeros(0, dtype=torch.int64)
        widths = head.in_features, head.out_features
        return empty, empty.clone(), torch.zeros(0, widths[0]), torch.zeros(0, widths[1])
    where, labels, features, logits = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return where, labels, features, logits


def evaluate_model(
    model: Model,
    data: SplitData,
    device: torch.device,
    directory: Path,
    *,
    taught_by: Sequence[Taught] = (),
    preemption: Preemption,
    watchdog: Watchdog,
    step: int = 0,
) -> dict[str, Any]:
    """Accuracy, cross-entropy, per-class accuracy and error bound on a split; a collective call.

    The bound, a list with an entry for each memory, is known on rank 0 alone, which writes it.

    Args:
        model: moved to ``device`` and put into eval mode.
        data: the split.
        device: where to compute.
        directory: where rank 0 writes ``predictions.safetensors``.
        taught_by: memories that the features are compared with, too.
        preemption: watched between batches.
        watchdog: told where the evaluation stands.
        step: that training has come to: the watchdog counts on from there.

    Raises:
        PreemptedError: on all ranks: one was signalled.
        IntegrityError: more of the samples are damaged than ``data.max_bad_fraction`` allows.
    """
    model.to(device)
    quarantine = open_quarantine(directory, data, data.max_bad_fraction, len(data.labelled()))
    places, labels, features, logits = infer(
        model,
        data,
        device,
        quarantine=quarantine,
        preemption=preemption,
        watchdog=watchdog,
        step=step,
    )
    compared = _compare(features, labels, taught_by)
    places, labels, features, logits = gather_sorted(places, labels, features, logits)
    predictions = logits.argmax(1)
    correct = (predictions == labels).numpy()
    with torch.no_grad():  # in the space of each memory
        mapped = [taught.projector.cpu()(features) for taught in taught_by]
    # The report draws them beside the first memory's prototypes.
    shown = mapped[0] if mapped else features
    tensors = {"labels": labels, "predictions": predictions, "features": shown.contiguous()}
    content = save(tensors, metadata={"label_names": json.dumps(data.label_names)})
    path = directory / "predictions.safetensors"
    distributed.run_on_main(lambda: write_file(path, content))
    bounds = _bounds(taught_by, mapped, logits, labels)
    return {
        "test/accuracy": float(correct.mean()),
        "test/cross_entropy": float(functional.cross_entropy(logits.double(), labels)),
        "test/per_class_accuracy": _by_class(correct, labels.numpy(), data.label_names),
        "test/samples": len(labels),
        "test/skipped": len(quarantine),
        **compared,
        **({"bound": bounds} if bounds else {}),
    }


def _by_class(
    correct: NDArray[np.bool_], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, float]:
    return {
        name: float(correct[truth == index].mean())
        for index, name in enumerate(names)
        if np.any(truth == index)
    }


def _bounds(
    taught_by: Sequence[Taught], mapped: Sequence[Tensor], logits: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """The error bound beside each memory, on rank 0; of a large split, of a part of it."""
    if not distributed.is_main():
        return []
    step = -(-len(labels) // _BOUND_SAMPLES) or 1
    part = slice(None, None, step)
    return [
        memory_bound(taught.memory, z[part], logits[part], labels[part])
        for taught, z in zip(taught_by, mapped, strict=True)
    ]


@torch.no_grad()
def _compare(features: Tensor, labels: Tensor, taught_by: Sequence[Taught]) -> dict[str, float]:
    """How well the features have come to mean what the memories' do; means over memories.

    ``nearest_prototype``: the class of the nearest prototype; ``knn``: the class that nearby
    prototypes hold most mass of, the farther the less; ``teacher_head``: what the teacher's head
    says of the features. Of all samples: those of classes that a memory lacks count as wrong.
    A collective call: each rank brings samples of its own.
    """
    if not taught_by:
        return {}
    right = torch.zeros(len(_COMPARISONS), dtype=torch.int64)
    for taught in taught_by:
        memory, z = taught.memory, taught.projector.cpu()(features)
        distance, ids = nearest(memory.prototypes, z, min(_NEIGHBOURS, len(memory.prototypes)))
        farther = (distance - distance[:, :1]) / memory.cost_scale
        mass = memory.prototype_mass[ids] * torch.exp(-farther / _NEIGHBOURHOOD)
        classes = memory.prototype_class[ids]
        votes = torch.zeros(len(z), len(memory.class_names)).scatter_add_(1, classes, mass)
        known = torch.bincount(memory.prototype_class, minlength=len(memory.class_names)) > 0
        logits = z @ memory.head_weight.T + memory.head_bias
        head = exclude_classes(logits, ~known).argmax(1)
        says = torch.stack([classes[:, 0], votes.argmax(1), head])
        right += (says == labels).sum(1)
    samples = sum(distributed.gather_integers(len(labels) * len(taught_by)))
    shares = distributed.all_reduce_sum(right).double() / max(1, samples)
    named = zip(_COMPARISONS, shares.tolist(), strict=True)
    return {f"test/{name}_accuracy": share for name, share in named}
