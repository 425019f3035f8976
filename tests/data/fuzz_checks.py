"""What the fuzz asks of a damaged split: which samples must be read, which refused, and how."""

from __future__ import annotations

import contextlib
import json
import re
import resource
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import torch

from cmkd_scale.data.damage import REASONS, DamagedError, Incident, Quarantine
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.order import Order
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.errors import (
    IntegrityError,
)
from cmkd_scale.records import Batch
from tests.data.fuzz_splits import SAMPLES, FuzzSplit
from tests.data.tar_mutations import Files

_ROOM = 1 << 29  # bytes


@contextlib.contextmanager
def little_room() -> Iterator[None]:
    """Turn an allocation that a forger could make as large as he likes into a failure."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def example(split: FuzzSplit, files: Files, name: str) -> Iterator[None]:
    """Put the files there, and say which example it is that fails."""
    split.put(files)
    try:
        yield
    except BaseException as error:
        error.add_note(f"{split.manifest.modality}, {name}")
        raise


def first_batch(reader: SampleReader, split: FuzzSplit, quarantine: Quarantine) -> Batch:
    """All of an epoch that can be read."""
    order = Order(Natural(len(reader)), reader.starts, seed=0)
    loader = TrainLoader(
        reader,
        split.reads,
        order,
        global_batch_size=len(reader),
        rank=0,
        world_size=1,
        augment=False,
        quarantine=quarantine,
    )
    with contextlib.closing(loader.batches()) as batches:
        return next(batches)


def same_content(one: bytes | None, other: bytes) -> bool:
    """Whether two manifests say the same: white space may differ."""
    if one is None or one == other:
        return one == other
    try:
        texts = [json.dumps(json.loads(text), sort_keys=True) for text in (one, other)]
        return texts[0] == texts[1]
    except (ValueError, RecursionError):
        return False


def check_samples(split: FuzzSplit, reader: SampleReader, readable: set[int]) -> None:
    for place, found in enumerate(reader.read(np.arange(SAMPLES))):
        if place in readable:
            assert found == split.samples[place]
        else:
            assert isinstance(found, DamagedError)
            assert found.reason in REASONS


def check_lenient_training(split: FuzzSplit, reader: SampleReader, readable: set[int]) -> None:
    met: list[Incident] = []
    quarantine = Quarantine(SAMPLES, max_bad_fraction=1.0, record=met.append)
    if not readable:
        with pytest.raises(IntegrityError, match="Hardly a sample"):
            first_batch(reader, split, quarantine)
        return
    batch = first_batch(reader, split, quarantine)
    assert {incident.place for incident in met} == set(range(SAMPLES)) - readable
    assert all(incident.shard == split.shard_of(incident.place) for incident in met)
    places = {sample.key: place for place, sample in enumerate(split.samples)}
    assert {places[key] for key in batch.keys} == readable
    for row, key in enumerate(batch.keys):
        assert batch.labels[row] == split.samples[places[key]].label
        assert torch.equal(batch.inputs[row], split.tensors[places[key]])


def check_strict_training(split: FuzzSplit, reader: SampleReader, readable: set[int]) -> None:
    quarantine = Quarantine(SAMPLES, max_bad_fraction=0.0)
    if len(readable) == SAMPLES:
        assert len(first_batch(reader, split, quarantine).keys) == SAMPLES
        return
    with pytest.raises(IntegrityError) as caught:
        first_batch(reader, split, quarantine)
    message = str(caught.value)
    # Where the index is lost, too, no key is known.
    assert any(
        split.shard_of(place) in message
        and re.search(rf"Sample ({split.samples[place].key}|number {place})\b", message)
        for place in set(range(SAMPLES)) - readable
    )
    assert "\n" not in message
