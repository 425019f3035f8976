"""The data of a run: opening a split, its training batches, and what the run notes about it."""

from __future__ import annotations

import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.damage import Incident, Quarantine, allowance
from cmkd_scale.data.labels import LabelMap, LabelReport, compare_labels
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.locate import open_manifest
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.data.modalities import MODALITIES, Modality
from cmkd_scale.data.order import Draw, Order
from cmkd_scale.data.processed import kind_of, processed
from cmkd_scale.data.processors import Processor
from cmkd_scale.data.sampling import choose, draw_from
from cmkd_scale.data.shards import lost_shards
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import IntegrityError, UsageError, did_you_mean
from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.stages.backbones import processor_for
from cmkd_scale.stages.runs import write_json

_log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
LABELS = "labels.json"

ProcessorOf = Callable[[str], Processor | None]
"""Modality -> what makes its inputs; None: the built-in one."""


@dataclass(frozen=True, slots=True)
class SplitData:
    """A split that is ready to be read."""

    reader: SampleReader
    modality: Modality
    label_names: tuple[str, ...]
    labels: NDArray[np.int32]
    """[N] index into ``label_names``, or ``UNLABELLED``."""
    max_bad_fraction: float
    workers: int

    def labelled(self) -> NDArray[np.int64]:
        """Places of all labelled samples."""
        return choose(self.labels, classes=len(self.label_names))


def open_split(config: Config, split: str, processor_of: ProcessorOf | None = None) -> SplitData:
    """Open a split of the run's shards; a collective call, since it may build them.

    Args:
        config: of the run.
        split: of its shards.
        processor_of: what makes inputs of their modality; None: as the config's model wants it.

    Raises:
        UsageError: no such shards or split, or an option the modality does not have.
    """
    manifest = manifest_of(config, split)
    find = processor_of or functools.partial(processor_for, config.model)
    processor = find(manifest.modality)
    modality = make_modality(manifest.modality, config.data.transform, processor)
    if not distributed.same_digest(manifest.digest):
        raise UsageError(
            f"The processes find different data at {config.data.shards}; give all machines the "
            "same shards."
        )
    label_map = LabelMap.make(manifest.label_names, config.data.label_map)
    reader = SampleReader(manifest, modality.wants, label_map.index)
    _refuse_losses(reader, config.data.max_bad_fraction)
    return SplitData(
        reader=reader,
        modality=modality,
        label_names=label_map.names,
        labels=reader.labels(),
        max_bad_fraction=config.data.max_bad_fraction,
        workers=config.data.workers,
    )


def manifest_of(config: Config, split: str) -> Manifest:
    """What there is to know of a split without its shards; collective, since it may build them.

    Raises:
        UsageError: no such shards or split.
    """
    config.require("data.shards")
    return open_manifest(
        str(config.data.shards),
        split=split,
        modality=config.data.modality,
        source=config.data.source,
        options=config.data.options,
        cache_limit_bytes=config.data.cache_limit_bytes,
    )


def _refuse_losses(reader: SampleReader, max_bad_fraction: float) -> None:
    """Before anything is trained: whole shards that are not there."""
    samples, missing = len(reader), 0
    for number, error in lost_shards(reader.manifest):
        _log.warning("%s", error)
        missing += reader.manifest.shards[number].nsamples
        if missing > allowance(max_bad_fraction, samples):
            raise IntegrityError(
                f"{error} Without it, {missing} of {samples} samples are missing, more than "
                f"data.max_bad_fraction={max_bad_fraction:g} allows."
            )


def make_modality(
    name: str, transform: Mapping[str, float | int], processor: Processor | None = None
) -> Modality:
    """A modality with some of its options set.

    Args:
        name: of the modality.
        transform: options.
        processor: that comes with the backbone, if it has one.

    Raises:
        UsageError: unknown modality or option, or a processor that cannot be used.
    """
    if name not in MODALITIES:
        raise UsageError(f"Modality '{name}' is unknown; {did_you_mean(name, MODALITIES)}")
    kind = MODALITIES[name] if processor is None else kind_of(processor)
    usual = {field.name: field.default for field in fields(kind) if field.name != "processor"}
    for option, value in transform.items():
        if option not in usual:
            where = "" if processor is None else " of a backbone with its own processor"
            raise UsageError(
                f"data.transform.{option} is not an option of modality '{name}'{where}; "
                f"{did_you_mean(option, usual)}"
            )
        if isinstance(usual[option], int) and not isinstance(value, int):
            raise UsageError(f"data.transform.{option} is {value}; it must be a whole number.")
    return kind(**transform) if processor is None else processed(processor, transform)


def make_train_loader(config: Config, data: SplitData, directory: Path) -> TrainLoader:
    """This rank's endless training batches, for the run in ``directory``."""
    draw = make_draw(config, data)
    quarantine = open_quarantine(directory, data, config.data.max_bad_fraction, draw.samples)
    return TrainLoader(
        data.reader,
        data.modality,
        Order(draw, data.reader.starts, config.run.seed),
        global_batch_size=config.train.global_batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        augment=config.data.augment,
        workers=config.data.workers,
        cache_bytes=config.data.cache_bytes,
        quarantine=quarantine,
    )


def make_draw(config: Config, data: SplitData) -> Draw:
    """What an epoch of training holds."""
    return draw_from(
        data.labels,
        classes=len(data.label_names),
        sampling=config.data.sampling,
        n_per_class=config.data.n_per_class,
        seed=config.run.seed,
    )


def drawn_places(config: Config, data: SplitData) -> NDArray[np.int64]:
    """Places of all labelled samples that training may read, each once, ascending."""
    places = make_draw(config, data).places(0)
    return np.arange(len(data.labels)) if places is None else np.unique(places)


def compare_streams(
    config: Config,
    data: SplitData,
    memories: Sequence[PrototypeMemory],
    directory: Path,
    *,
    say: bool = True,
) -> None:
    """Before training: what the student's labels and the memories' have in common.

    Rank 0 writes ``labels.json`` and says it; without ``say``, only what does not fit. Without
    a memory there is nothing to compare; several count as one that knows what any of them does.
    """
    if not memories:
        return
    report, drawn_here = label_report(config, data, memories)
    if distributed.is_main():
        write_json(directory / LABELS, {**report.to_json(), "counts_here": drawn_here})
        if say or not report.fits:
            for line in report.lines():
                _log.info("%s", line)


def label_report(
    config: Config, data: SplitData, memories: Sequence[PrototypeMemory]
) -> tuple[LabelReport, dict[str, int]]:
    """The student's labels beside those of its memories, and its samples by class name."""
    places = make_draw(config, data).places(0)
    drawn = data.labels if places is None else data.labels[places]
    counts = np.bincount(drawn[drawn >= 0], minlength=len(data.label_names)).tolist()
    taught: Counter[str] = Counter()
    for memory in memories:
        known = memory.class_count * (memory.class_kept > 0)
        taught.update(dict(zip(memory.class_names, known.tolist(), strict=True)))
    modality = ", ".join(str(memory.provenance.get("modality", "teacher")) for memory in memories)
    drawn_here = dict(zip(data.label_names, counts, strict=True))
    report = compare_labels(
        f"student ({data.reader.manifest.modality})",
        drawn_here,
        f"memory ({modality})",
        dict(taught),
    )
    return report, drawn_here


def open_quarantine(
    directory: Path, data: SplitData, max_bad_fraction: float, samples: int
) -> Quarantine:
    """For a pass over ``samples`` of a split; what earlier parts of the run left out counts, too.

    A collective call: on machines that share no disk only one of them has the file. Rank 0
    writes ``quarantine.jsonl``: data, shard, key and reason of each damaged sample.

    Raises:
        IntegrityError: on all ranks: the run has met more than allowed before.
    """
    path, name = directory / QUARANTINE, data.reader.manifest.name
    mine = torch.tensor(_places(path, name), dtype=torch.int64)
    # All have read when this returns, so rank 0 may add to the file from here on.
    known = distributed.gather_rows(mine).tolist()

    def record(incident: Incident) -> None:
        if distributed.is_main():
            line = json.dumps({"data": name, **asdict(incident)})
            try:
                with path.open("a") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise UsageError(f"{path} cannot be written: {error}. Free space.") from None

    quarantine = Quarantine(samples, max_bad_fraction=max_bad_fraction, record=record, known=known)
    try:
        quarantine.check()
    except IntegrityError as error:
        raise IntegrityError(
            f"{error} They are listed in {path}: remove it once the shards are mended."
        ) from None
    return quarantine


def _places(path: Path, name: str) -> list[int]:
    """Of the samples of one split in a ``quarantine.jsonl``; lines cut short are left out."""
    places = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            about = json.loads(line)
            if about["data"] == name:
                places.append(int(about["place"]))
        except (ValueError, KeyError, TypeError):
            _log.warning("%s: a line that is no record of a sample is passed over", path)
    return places
