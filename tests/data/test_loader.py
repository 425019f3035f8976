from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.data.loader import TrainLoader, ordered_batches
from cmkd_scale.data.modalities import TextModality
from cmkd_scale.data.order import epoch_order
from cmkd_scale.data.stream import SampleReader, labelled_subset
from cmkd_scale.errors import IntegrityError, UsageError
from tests.data.examples import build_toy


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SampleReader:
    return SampleReader(build_toy(tmp_path_factory.mktemp("toy")))


@dataclass(frozen=True)
class NoisyText(TextModality):
    """Text whose augmentation leaves a random mark, to see what its generator depends on."""

    def augment(self, inputs: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        marked = inputs.clone()
        marked[-1] = int(rng.integers(1, 257))
        return marked


def make(
    reader: SampleReader,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch: int = 12,
    seed: int = 0,
    augment: bool = False,
    workers: int = 0,
    cache_bytes: int = 0,
) -> TrainLoader:
    return TrainLoader(
        reader,
        NoisyText(),
        np.arange(len(reader)),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        seed=seed,
        augment=augment,
        workers=workers,
        cache_bytes=cache_bytes,
    )


def keys(loader: TrainLoader, count: int) -> list[tuple[str, ...]]:
    return [batch.keys for batch in itertools.islice(loader.batches(), count)]


def test_batches_follow_the_order_across_epochs(reader: SampleReader) -> None:
    batches = keys(make(reader, batch=16), 8)  # 128 samples of epochs 0, 1 and 2
    expected = [
        reader.index.key(int(place))
        for epoch in range(3)
        for place in epoch_order(60, seed=0, epoch=epoch)
    ]
    assert list(itertools.chain(*batches)) == expected[:128]


@given(
    schedule=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 6)), min_size=1, max_size=5
    )
)
def test_any_schedule_of_world_sizes_reads_the_same_samples(
    reader: SampleReader, schedule: list[tuple[int, int]]
) -> None:
    state = make(reader).state()
    read = []
    for world_size, steps in schedule:
        ranks = [make(reader, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            rank.load_state(state)
        shares = [keys(rank, steps) for rank in ranks]
        for step in range(steps):
            # Rank r holds positions r, r + W, ...: interleaving restores the global batch.
            parts = [share[step] for share in shares]
            read += [key for row in zip(*parts, strict=True) for key in row]
        states = [rank.state() for rank in ranks]
        assert all(one == states[0] for one in states)
        state = states[0]
    total = sum(steps for _, steps in schedule)
    assert read == list(itertools.chain(*keys(make(reader), total)))


@pytest.mark.slow
def test_the_state_is_that_of_the_last_delivered_batch(reader: SampleReader) -> None:
    loader = make(reader, workers=2)
    batches = loader.batches()
    first = [next(batches).keys, next(batches).keys]
    state = loader.state()
    batches.close()  # type: ignore[attr-defined]
    assert (state["epoch"], state["position"]) == (0, 24)
    resumed = make(reader)
    resumed.load_state(state)
    assert first + keys(resumed, 3) == keys(make(reader), 5)


@pytest.mark.slow
def test_augmentation_depends_on_seed_and_position_alone(reader: SampleReader) -> None:
    def marks(**options: int) -> dict[tuple[int, str], int]:
        world_size = options.get("world_size", 1)
        found = {}
        for rank in range(world_size):
            loader = make(reader, augment=True, rank=rank, **options)
            for step, batch in enumerate(itertools.islice(loader.batches(), 7)):
                for key, inputs in zip(batch.keys, batch.inputs, strict=True):
                    found[step, key] = int(inputs[-1])
        return found

    alone = marks()
    assert marks(world_size=3) == alone
    assert marks(workers=2) == alone
    assert marks(cache_bytes=2**20) == alone
    assert marks(seed=1) != alone
    epochs = [[value for (step, _), value in alone.items() if step // 5 == e] for e in (0, 1)]
    assert epochs[0][:20] != epochs[1][:20], "an epoch draws anew"


def test_a_state_of_other_data_or_seed_is_refused(reader: SampleReader, tmp_path: Path) -> None:
    state = make(reader).state()
    other = SampleReader(build_toy(tmp_path, count=52))
    with pytest.raises(IntegrityError, match="other data"):
        make(other).load_state(state)
    with pytest.raises(IntegrityError, match="seed"):
        make(reader, seed=1).load_state(state)


def test_the_cache_holds_no_more_than_it_may(reader: SampleReader) -> None:
    size = 64 * 8  # bytes of one decoded text
    loader = make(reader, cache_bytes=10 * size)
    keys(loader, 10)
    assert len(loader.dataset.cache) == 10


def test_evaluation_gives_each_sample_once_in_batches_that_do_not_depend_on_ranks(
    reader: SampleReader,
) -> None:
    places = np.arange(3, 58)

    def share(rank: int, world_size: int) -> list[tuple[str, ...]]:
        batches = ordered_batches(
            reader, TextModality(), places, batch_size=8, rank=rank, world_size=world_size
        )
        return [batch.keys for _, batch in batches]

    alone = share(0, 1)
    assert list(itertools.chain(*alone)) == [reader.index.key(int(place)) for place in places]
    for world_size in (2, 3, 9):
        shares = [share(rank, world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*shares)) == sorted(alone)


def test_an_undecodable_sample_is_named(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    shard = manifest.directory / manifest.shards[0].url
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"train 5:", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9:"))
    with pytest.raises(IntegrityError, match=r"toy-train-000005.*cannot be decoded"):
        keys(make(SampleReader(manifest)), 5)


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    manifest = build_toy(tmp_path)
    reader = SampleReader(manifest)
    shard = manifest.directory / manifest.shards[1].url
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(IntegrityError, match="shard-000001"):
        keys(make(reader), 5)


def test_subsets_are_balanced_nested_and_chosen_by_the_seed(reader: SampleReader) -> None:
    def subset(count: int | None, seed: int = 0) -> set[int]:
        chosen = labelled_subset(reader.index, classes=4, n_per_class=count, seed=seed)
        assert list(chosen) == sorted(chosen)
        return set(chosen.tolist())

    three, five = subset(3), subset(5)
    assert np.bincount(reader.index.labels[sorted(three)]).tolist() == [3, 3, 3, 3]
    assert three < five < subset(None) == set(range(60))
    assert subset(3, seed=1) != three
    with pytest.raises(UsageError, match=r"at most 15"):
        subset(16)
