"""Any history of a run reads the same samples: world sizes, workers, batches, stops, resumes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmkd_scale.data import order as order_module
from cmkd_scale.data.loader import TrainLoader
from cmkd_scale.data.modalities import TextModality
from cmkd_scale.data.order import Draw, Order
from cmkd_scale.data.sampling import Natural, Weighted
from cmkd_scale.data.stream import SampleReader
from tests.data.examples import build_toy


class Segment(NamedTuple):
    """What runs between two stops."""

    world_size: int
    batch: int
    steps: int
    workers: dict[int, int]
    """Rank to its number of workers, where it is not 0."""


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    world_size = draw(st.integers(1, 16))
    batch = draw(st.integers(world_size, 48))
    workers = {}
    if draw(st.integers(0, 4)) == 0:  # processes are slow to start
        workers[draw(st.integers(0, world_size - 1))] = draw(st.integers(1, 3))
    return Segment(world_size, batch, draw(st.integers(1, 6)), workers)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[SampleReader]:
    """One shard, several, and one for each sample."""
    shapes = [(23, 50), (120, 16), (61, 1)]
    return [
        SampleReader(build_toy(tmp_path_factory.mktemp("toy"), count=count, per_shard=per_shard))
        for count, per_shard in shapes
    ]


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes and blocks that a hundred samples fill several times."""
    for name, value in {"LANES": 6, "BLOCK": 4, "POOL": 24}.items():
        monkeypatch.setattr(order_module, name, value)


def draw_of(reader: SampleReader, sampling: str) -> Draw:
    if sampling == "natural":
        return Natural(len(reader))
    labels = reader.labels()
    return Weighted(np.arange(len(reader)), labels, sampling="balanced", seed=1, name="labelled")


def run(
    reader: SampleReader, order: Order, segment: Segment, state: str | None
) -> tuple[list[str], str]:
    """One segment on all its ranks: the global sequence of keys, and the state at its end."""
    shares, states = [], set()
    for rank in range(segment.world_size):
        loader = TrainLoader(
            reader,
            TextModality(),
            order,
            global_batch_size=segment.batch,
            rank=rank,
            world_size=segment.world_size,
            augment=False,
            workers=segment.workers.get(rank, 0),
        )
        if state is not None:
            loader.load_state(json.loads(state))
        # One batch more is asked for where there are workers: it must not count.
        batches: Iterator[object] = loader.batches()
        shares.append([next(batches).keys for _ in range(segment.steps)])  # type: ignore[attr-defined]
        states.add(json.dumps(loader.state(), sort_keys=True))
    assert len(states) == 1, "the state depends on the rank"
    keys = []
    for step in range(segment.steps):
        for row in itertools.zip_longest(*(share[step] for share in shares)):
            keys += [key for key in row if key is not None]
    return keys, states.pop()


@pytest.mark.slow
@pytest.mark.usefixtures("small_lanes")
@settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    which=st.integers(0, 2),
    seed=st.integers(0, 2**31 - 1),
    sampling=st.sampled_from(["natural", "natural", "balanced"]),
    schedule=st.lists(segments(), min_size=1, max_size=4),
)
def test_any_schedule_reads_each_sample_once_an_epoch_in_one_order(
    readers: list[SampleReader],
    which: int,
    seed: int,
    sampling: str,
    schedule: list[Segment],
) -> None:
    reader = readers[which]
    read: list[str] = []
    state = None
    for segment in schedule:
        keys, state = run(
            reader, Order(draw_of(reader, sampling), reader.starts, seed), segment, state
        )
        assert len(keys) == segment.batch * segment.steps
        read += keys
    # One process that never stops, and knows nothing of batches.
    alone = Order(draw_of(reader, sampling), reader.starts, seed)
    assert read == [reader.key(int(alone.places(np.array([n]))[0])) for n in range(len(read))]
    if sampling == "natural":
        every = sorted(reader.key(place) for place in range(len(reader)))
        for start in range(0, len(read) - len(reader) + 1, len(reader)):
            assert sorted(read[start : start + len(reader)]) == every


def test_the_program_prints_the_same_stream_for_any_schedule(tmp_path: Path) -> None:
    from cmkd_scale.operations.stream import StreamOptions, stream_keys

    manifest = build_toy(tmp_path, count=60)
    directory = str(manifest.directory)

    def keys(
        rank: int, world_size: int, stop: int | None, state: Path | None, save: Path | None
    ) -> list[str]:
        options = StreamOptions("train", None, rank, world_size, seed=5)
        return list(stream_keys(directory, options, stop_after=stop, state=state, save_state=save))

    whole = keys(0, 1, None, None, None)
    read: list[str] = []
    state = None
    for number, (world_size, stop) in enumerate([(3, 4), (1, 7), (5, 2), (16, 1), (2, None)]):
        saved = tmp_path / f"{number}.json"
        shares, states = [], set()
        for rank in range(world_size):
            shares.append(keys(rank, world_size, stop, state, saved))
            states.add(saved.read_bytes())
        assert len(states) == 1, "every rank saves the same state"
        for row in itertools.zip_longest(*shares):
            read += [key for key in row if key is not None]
        state = saved
    assert read == whole
    assert sorted(read) == [f"toy-train-{n:06d}" for n in range(60)]
