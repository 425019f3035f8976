"""What a run's steps read and run beside the labelled samples of the student.

A teacher that runs along with its own samples, samples without labels, and further students, for
the methods that want them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.data.companions import Accompanied, CachedSamples, TeacherSamples
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.order import Draw, Order, stable_hash
from cmkd_scale.data.partners import Partners
from cmkd_scale.data.sampling import Natural, choose
from cmkd_scale.data.teacher_outputs import TeacherOutputs
from cmkd_scale.errors import UsageError
from cmkd_scale.losses import LOSSES, Sizes
from cmkd_scale.models.model import Model
from cmkd_scale.stages.backbones import weights_directory
from cmkd_scale.stages.common import (
    ModelSpec,
    Trained,
    open_split_for,
    weights_digest,
    with_data_of,
)
from cmkd_scale.stages.streams import SplitData, drawn_places, make_train_loader, open_quarantine
from cmkd_scale.training.live_teacher import CachedTeacher, LiveTeacher, SampleTeacher
from cmkd_scale.training.method import Method

Teacher = Trained | TeacherOutputs
"""One that runs beside the student, or what it has said."""

_OTHERS = 1  # sets the order of unlabelled samples apart from that of the labelled ones


def make_loader(
    config: Config, method: Method, teacher: Teacher | None, data: SplitData, directory: Path
) -> TrainLoader | Accompanied:
    """This rank's endless batches with all that the method reads; a collective call.

    Raises:
        UsageError: a sample has no partner, or there are no samples without labels.
    """
    main = make_train_loader(config, data, directory)
    if teacher is None and not method.unlabelled:
        return main
    samples = None if teacher is None else _teacher_samples(config, teacher, data)
    others = _unlabelled(config, data, directory) if method.unlabelled else None
    return Accompanied(main, teacher=samples, unlabelled=others)


def _teacher_samples(config: Config, teacher: Teacher, data: SplitData) -> Partners:
    samples = _partners(config, teacher, data.label_names)
    places = drawn_places(config, data)
    if config.data.mode == "paired":
        samples.require_keys([data.reader.key(int(place)) for place in places])
    elif config.data.mode == "class_matched":
        found = sorted(set(data.labels[places].tolist()) - {-1})
        samples.require_classes({label: data.label_names[label] for label in found})
    return samples


def _partners(config: Config, teacher: Teacher, names: tuple[str, ...]) -> Partners:
    mode, seed = config.data.mode, config.run.seed
    if isinstance(teacher, TeacherOutputs):
        labels = _in_classes(teacher.samples.labels.numpy(), teacher.manifest.label_names, names)
        return CachedSamples(teacher, labels, mode=mode, seed=seed)
    theirs = with_data_of(teacher, config)
    if config.teacher.shards is not None:
        theirs = with_changes(theirs, {"data.shards": config.teacher.shards})
    split = open_split_for(teacher, theirs, theirs.data.train_split)
    return TeacherSamples(
        split.reader,
        split.modality,
        _in_classes(split.labels, split.label_names, names),
        mode=mode,
        seed=seed,
        augment=config.data.augment,
        cache_bytes=config.data.cache_bytes,
    )


def _in_classes(
    labels: NDArray[np.integer[Any]], theirs: Sequence[str], names: Sequence[str]
) -> NDArray[np.int64]:
    """[N] a teacher's labels as places in ``names``; -1 for classes that are not there."""
    place = {name: index for index, name in enumerate(names)}
    of_class = np.array([place.get(name, -1) for name in theirs] + [-1], dtype=np.int64)
    return np.asarray(of_class[labels])  # UNLABELLED is -1: the last entry


def _unlabelled(
    config: Config, data: SplitData, directory: Path
) -> tuple[TrainLoader, TrainLoader]:
    """Loaders of the same samples, augmented and as they are."""
    draw = _unlabelled_draw(config, data)
    size = config.train.unlabelled_batch_size or config.train.global_batch_size
    pieces = distributed.world_size() * config.train.gradient_accumulation_steps
    if size % pieces:
        raise UsageError(
            f"train.unlabelled_batch_size {size} cannot be divided over {pieces} processes and "
            f"parts; use {max(pieces, size - size % pieces)}."
        )

    def loader(augment: bool) -> TrainLoader:
        return TrainLoader(
            data.reader,
            data.modality,
            Order(draw, data.reader.starts, stable_hash(config.run.seed, _OTHERS) % 2**31),
            global_batch_size=size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            augment=augment,
            workers=config.data.workers,
            cache_bytes=config.data.cache_bytes,
            quarantine=open_quarantine(directory, data, config.data.max_bad_fraction, draw.samples),
        )

    return loader(config.data.augment), loader(augment=False)


def _unlabelled_draw(config: Config, data: SplitData) -> Draw:
    every = len(data.labels)
    if config.data.unlabelled == "unlabelled":
        places = choose(data.labels, classes=len(data.label_names), which="unlabelled")
        return Natural(every, places, name="unlabelled")
    places = np.setdiff1d(np.arange(every), drawn_places(config, data))
    if len(places) == 0:
        raise UsageError(
            "data.unlabelled=rest reads what data.n_per_class leaves over, and that is nothing: "
            "lower data.n_per_class, or choose data.unlabelled=unlabelled."
        )
    return Natural(every, places, name="rest")


def make_live(
    method: Method, teacher: Teacher | None, names: tuple[str, ...]
) -> SampleTeacher | None:
    """The teacher that is read sample by sample; its run's model stays as it is."""
    if teacher is None:
        return None
    if isinstance(teacher, TeacherOutputs):
        known = teacher.samples
        return CachedTeacher(
            known.head_weight, known.head_bias, teacher.manifest.label_names, names
        )
    model = copy.deepcopy(teacher.model) if method.trains_teacher else teacher.model
    return LiveTeacher(model, teacher.spec.label_names, names, learns=method.trains_teacher)


def teacher_digest(teacher: Teacher | None) -> str | None:
    """SHA-256 of its weights."""
    if isinstance(teacher, TeacherOutputs):
        return str(teacher.manifest.fingerprint["teacher"])
    return None if teacher is None else weights_digest(teacher.model)


def teacher_width(teacher: Teacher) -> int:
    """Width E of its features."""
    if isinstance(teacher, TeacherOutputs):
        return teacher.manifest.feature_dim
    return teacher.spec.feature_dim


def make_cohort(method: Method, spec: ModelSpec, config: Config) -> list[Model]:
    """The students beside the first, each from weights of its own, less a backbone's."""
    cohort = []
    for number in range(1, method.students):
        torch.manual_seed(stable_hash(config.run.seed, number) % 2**31)
        cohort.append(spec.build(weights_directory(config.model)))
    return cohort


def sizes_of(
    method: Method, model: Model, spec: ModelSpec, teacher: Teacher | None
) -> Sizes | None:
    """What losses with parameters are built from; None if the method has none."""
    if teacher is None or all(LOSSES[name].build is None for name in method.components):
        return None
    return Sizes(
        classes=len(spec.label_names),
        student_dim=model.head.in_features,
        teacher_dim=teacher_width(teacher),
        student_stages=_stage_channels(model, spec),
        teacher_stages=()  # no method that reads stages has a teacher in files
        if isinstance(teacher, TeacherOutputs)
        else _stage_channels(teacher.model, teacher.spec),
    )


@torch.no_grad()
def _stage_channels(model: Model, spec: ModelSpec) -> tuple[int, ...]:
    """Channels of each stage's output, from a sample of zeros."""
    kind = torch.int64 if spec.modality == "text" else torch.float32
    device = next(model.parameters()).device
    stages = model(torch.ones(1, *spec.shape, dtype=kind, device=device)).stages
    return tuple(_channels(stage) for stage in stages)


def _channels(stage: Tensor) -> int:
    return stage.shape[1] if stage.dim() == 4 else stage.shape[-1]
