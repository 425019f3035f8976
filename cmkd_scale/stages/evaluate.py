"""``cmkd evaluate``: accuracy of a trained model on a split, each sample counted once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.damage import Quarantine
from cmkd_scale.data.loader import ordered_batches
from cmkd_scale.losses.label_alignment import exclude_classes
from cmkd_scale.memory.nearest import nearest
from cmkd_scale.memory.sync import gather_sorted
from cmkd_scale.models.model import Model
from cmkd_scale.stages.common import Taught, load_trained, open_split_for, start_engine
from cmkd_scale.stages.runs import write_file, write_results
from cmkd_scale.stages.streams import SplitData, open_quarantine

_BATCH_SIZE = 128
_NEIGHBOURS = 8  # prototypes that vote on a class
_COMPARISONS = ("nearest_prototype", "knn", "teacher_head")
_NEIGHBOURHOOD = 0.1  # in units of the cost scale: so much farther, a vote counts 1/e


def evaluate(config: Config) -> dict[str, Any]:
    """Evaluate the newest checkpoint of ``run.dir`` on ``data.test_split``.

    Writes ``evaluation.json`` and ``predictions.safetensors`` into the run directory.

    Raises:
        UsageError: there is no trained model, or the split has other labels than it.
    """
    began = time.perf_counter()
    engine = start_engine(config)
    config.require("run.dir")
    directory = Path(str(config.run.dir))
    trained = load_trained(directory, "student")
    data = open_split_for(trained, config, config.data.test_split)
    metrics = evaluate_model(
        trained.model, data, engine.device, directory, taught_by=trained.taught_by
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


@torch.no_grad()
def infer(
    model: Model,
    data: SplitData,
    device: torch.device,
    *,
    quarantine: Quarantine,
    batch_size: int = _BATCH_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass this rank's share of the labelled samples through a model; no collectives.

    Returns:
        Places [n] int64, labels [n], features [n, D] and logits [n, C] on the CPU.
    """
    model.eval()
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    labelled = data.labelled()
    batches = ordered_batches(
        data.reader,
        data.modality,
        labelled,
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=data.workers,
        quarantine=quarantine,
    )
    total, done = len(labelled), 0
    for where, batch in batches:
        # Ranks take batches in turn, so this one's count stands for all.
        done = min(total, done + len(where) * distributed.world_size())
        progress(done, total)
        output = model(batch.inputs.to(device))
        parts.append(
            (
                torch.from_numpy(where),
                batch.labels,
                output.features.float().cpu(),
                output.logits.float().cpu(),
            )
        )
    if not parts:
        # More ranks than batches: an empty share with the right widths.
        head = model.head
        empty = torch.zeros(0, dtype=torch.int64)
        widths = head.in_features, head.out_features
        return empty, empty.clone(), torch.zeros(0, widths[0]), torch.zeros(0, widths[1])
    places, labels, features, logits = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return places, labels, features, logits


def evaluate_model(
    model: Model,
    data: SplitData,
    device: torch.device,
    directory: Path,
    *,
    taught_by: Sequence[Taught] = (),
) -> dict[str, Any]:
    """Accuracy, cross-entropy and per-class accuracy on a split; a collective call.

    Args:
        model: moved to ``device`` and put into eval mode.
        data: the split.
        device: where to compute.
        directory: where rank 0 writes ``predictions.safetensors``.
        taught_by: memories that the features are compared with, too.

    Raises:
        IntegrityError: more of the samples are damaged than ``data.max_bad_fraction`` allows.
    """
    model.to(device)
    quarantine = open_quarantine(directory, data, data.max_bad_fraction, len(data.labelled()))
    places, labels, features, logits = infer(model, data, device, quarantine=quarantine)
    quarantine.share(data.reader)
    compared = _compare(features, labels, taught_by)
    places, labels, features, logits = gather_sorted(places, labels, features, logits)
    predictions = logits.argmax(1)
    correct = (predictions == labels).numpy()
    with torch.no_grad():  # where the report draws them beside the first memory's prototypes
        shown = taught_by[0].projector.cpu()(features) if taught_by else features
    tensors = {"labels": labels, "predictions": predictions, "features": shown.contiguous()}
    content = save(tensors, metadata={"label_names": json.dumps(data.label_names)})
    path = directory / "predictions.safetensors"
    distributed.run_on_main(lambda: write_file(path, content))
    truth = labels.numpy()
    per_class = {
        name: float(correct[truth == index].mean())
        for index, name in enumerate(data.label_names)
        if np.any(truth == index)
    }
    return {
        "test/accuracy": float(correct.mean()),
        "test/cross_entropy": float(functional.cross_entropy(logits.double(), labels)),
        "test/per_class_accuracy": per_class,
        "test/samples": len(labels),
        "test/skipped": len(quarantine),
        **compared,
    }


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
