"""The order of samples: the same for ever, each sample once an epoch, and kind to the disk."""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmkd_scale.data import order as module
from cmkd_scale.data.order import (
    BLOCK,
    LANES,
    POOL,
    Ints,
    Order,
    Position,
    mix64,
    permutation,
    rank_positions,
    stable_hash,
)
from cmkd_scale.data.sampling import Natural, Weighted

FROZEN = [[7, 1, 6, 0, 3, 5, 4, 2], [7, 5, 2, 0, 3, 6, 1, 4]]
FROZEN_LARGE = "a38869550a650e7c508c2c973e5822cb80b174c6f4d75b5833d729288146f451"

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def make(sizes: Sequence[int], seed: int = 0) -> Order:
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    return Order(Natural(int(starts[-1])), starts, seed)


def epoch_of(order: Order, epoch: int = 0) -> Ints:
    return order.places(np.arange(epoch * len(order), (epoch + 1) * len(order)))


def shards_of(order: Order, sizes: Sequence[int], epoch: int = 0) -> Ints:
    """Number of the shard that is read at each position of an epoch."""
    return np.repeat(np.arange(len(sizes)), sizes)[epoch_of(order, epoch)]


@contextmanager
def small_lanes(lanes: int = 4, block: int = 8) -> Iterator[None]:
    """Lanes that a few dozen samples fill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LANES", lanes)
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "POOL", lanes * block)
        yield


def slow_epoch(sizes: Sequence[int], key: tuple[int, int], lanes: int, block: int) -> list[int]:
    """What order.py describes, in lists: shards, their chunks, lanes, blocks."""
    starts = list(itertools.accumulate(sizes, initial=0))
    pieces = [-(-size // block) for size in sizes]
    numbers = list(itertools.accumulate(pieces, initial=0))
    turns = permutation(numbers[-1], *key, 1).tolist()
    row: list[int] = []
    for shard in permutation(len(sizes), *key, 0):
        for chunk in sorted(range(pieces[shard]), key=lambda n: turns.index(numbers[shard] + n)):
            ends = [(chunk + side) * sizes[shard] // pieces[shard] for side in (0, 1)]
            row += range(starts[shard] + ends[0], starts[shard] + ends[1])
    length, longer = divmod(len(row), lanes)
    block = min(block, 4 * -(-len(row) // sum(size > 0 for size in sizes)))
    left = iter(row)
    columns = []
    for lane in range(lanes):
        column = list(itertools.islice(left, length + (lane < longer)))
        parts = [column[start : start + block] for start in range(0, len(column), block)]
        columns.append(
            [
                part[place]
                for number, part in enumerate(parts)
                for place in permutation(len(part), *key, lane, number)
            ]
        )
    turn = itertools.chain(*itertools.zip_longest(*columns))
    return [place for place in turn if place is not None]


@given(count=st.integers(0, 500), key=st.lists(st.integers(0, 2**64), max_size=4))
def test_a_permutation_is_one(count: int, key: list[int]) -> None:
    assert sorted(permutation(count, *key)) == list(range(count))


@given(sizes=SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@example(sizes=[0, 33, 0], seed=0, epoch=0)
@example(sizes=[32], seed=0, epoch=0)
@example(sizes=[33], seed=0, epoch=0)
@example(sizes=[7, 8, 9, 8], seed=0, epoch=0)
@example(sizes=[5_000], seed=0, epoch=0)
@example(sizes=[1] * 5_000, seed=0, epoch=0)
@example(sizes=[0, 1] * 50 + [1_000], seed=0, epoch=0)
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, epoch: int) -> None:
    with small_lanes():
        assert sorted(epoch_of(make(sizes, seed), epoch)) == list(range(sum(sizes)))


@pytest.mark.parametrize(
    "sizes",
    [
        [POOL - 1],
        [POOL],
        [POOL + 1],
        [2 * POOL + LANES + 1],
        [50] * 2_100,
        [BLOCK - 1, BLOCK, BLOCK + 1, 0] * 40,
    ],
    ids=["below", "pool", "above", "huge", "tiny", "blocks"],
)
def test_a_large_epoch_is_a_permutation(sizes: list[int]) -> None:
    order = make(sizes, seed=5)
    for epoch in (0, 3):
        assert np.array_equal(np.sort(epoch_of(order, epoch)), np.arange(sum(sizes)))


@given(sizes=SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
@example(sizes=[5, 7], seed=0, epoch=0)  # as many as lanes and blocks hold
@example(sizes=[6, 7], seed=0, epoch=0)
def test_lanes_are_those_of_a_plain_program(sizes: list[int], seed: int, epoch: int) -> None:
    with small_lanes(lanes=3, block=4):
        order = make(sizes, seed)
        if len(order) <= 12:
            expected = permutation(len(order), seed, epoch).tolist()
        else:
            expected = slow_epoch(sizes, (seed, epoch), lanes=3, block=4)
        assert epoch_of(order, epoch).tolist() == expected


@given(
    sizes=SIZES,
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    again=st.lists(st.integers(0, 10_000), max_size=30),
    shuffled=st.randoms(use_true_random=False),
)
def test_a_place_depends_on_its_number_alone(
    sizes: list[int], cuts: list[int], again: list[int], shuffled: Random
) -> None:
    with small_lanes():
        total = 3 * sum(sizes)
        one_by_one = make(sizes)
        expected = np.array([one_by_one.places(np.array([n]))[0] for n in range(total)])
        order = make(sizes)
        borders = sorted({0, total, *(cut % total for cut in cuts)})
        spans = list(itertools.pairwise(borders))
        shuffled.shuffle(spans)
        for start, stop in spans:
            assert np.array_equal(order.places(np.arange(start, stop)), expected[start:stop])
        numbers = np.array(again, dtype=np.int64) % total
        assert np.array_equal(order.places(numbers), expected[numbers])


def test_a_large_place_depends_on_its_number_alone() -> None:
    order, other = make([1000] * 101), make([1000] * 101)
    expected = np.concatenate([epoch_of(order, epoch) for epoch in range(2)])
    rng = np.random.default_rng(0)
    for size in (1, 7, 5000):
        numbers = rng.integers(0, len(expected), size)
        assert np.array_equal(other.places(numbers), expected[numbers])
    border = np.arange(len(order) - 300, len(order) + 300)
    assert np.array_equal(other.places(border), expected[border])


@pytest.mark.parametrize("shards", [5, 60])
def test_seeds_and_epochs_give_other_orders(shards: int) -> None:
    with small_lanes():
        orders = {
            tuple(epoch_of(make([5] * shards, seed), epoch))
            for seed in range(5)
            for epoch in range(5)
        }
    assert len(orders) == 25


def test_the_order_never_changes_between_releases() -> None:
    # A published run must be repeatable: these values are frozen.
    assert permutation(8, 0, 0).tolist() == FROZEN[0]
    assert permutation(8, 1, 2).tolist() == FROZEN[1]
    assert epoch_of(make([3, 5], seed=1), 2).tolist() == FROZEN[1]
    # SplitMix64's published first output for seed 0.
    assert int(mix64(np.zeros(1, dtype=np.uint64))[0]) == 0xE220A8397B1DCDAF
    large = epoch_of(make([1000] * 150, seed=3), 2)
    assert hashlib.sha256(large.astype("<i8").tobytes()).hexdigest() == FROZEN_LARGE


@given(value=st.integers(0, 2**64 - 1))
def test_one_integer_is_hashed_as_many_are(value: int) -> None:
    inner = int(mix64(np.array([value], dtype=np.uint64))[0])
    assert stable_hash(value) == int(mix64(np.array([inner], dtype=np.uint64))[0])


def test_every_sample_is_equally_likely_at_every_place() -> None:
    # Chi-square over 20 samples x 20 places; with 361 degrees of freedom 468 is p = 1e-4.
    order = make([8, 0, 12], seed=7)
    counts = np.zeros((20, 20))
    for epoch in range(2000):
        counts[np.arange(20), epoch_of(order, epoch)] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 468


def test_every_sample_is_equally_likely_at_every_place_of_lanes() -> None:
    # As above; with 961 degrees of freedom 1128 is p = 1e-4.
    counts = np.zeros((32, 32))
    with small_lanes(lanes=2, block=4):
        order = make([4] * 8, seed=7)
        for epoch in range(3200):
            counts[np.arange(32), epoch_of(order, epoch)] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 1128


# ------------------------------------------------------------------- what it does to the disk


def test_neighbours_come_from_different_shards() -> None:
    shards = shards_of(make([1000] * 500), [1000] * 500)
    for distance in range(1, LANES):
        assert not (shards[distance:] == shards[:-distance]).any()


@pytest.mark.parametrize(("size", "count"), [(300, 700), (1000, 500), (5000, 60)])
def test_few_shards_are_open_at_once(size: int, count: int) -> None:
    shards = shards_of(make([size] * count), [size] * count)
    a_lane = -(-BLOCK // size) + 1  # shards that BLOCK consecutive samples can touch
    for start in range(0, len(shards), POOL):
        assert len(np.unique(shards[start : start + POOL])) <= LANES * a_lane
    for start in range(POOL // 2, len(shards), POOL):  # two blocks of each lane
        a_pair = -(-2 * BLOCK // size) + 1
        assert len(np.unique(shards[start : start + POOL])) <= LANES * a_pair


# The last column: lanes have borders, and where a block touches many shards, blocks have too.
@pytest.mark.parametrize(
    ("size", "count", "borders"),
    [(1000, 600, LANES - 1), (300, 700, 3 * LANES), (40, 3000, 8 * LANES)],
)
def test_each_shard_is_opened_once_and_once_more_at_a_border(
    size: int, count: int, borders: int
) -> None:
    kept: OrderedDict[int, None] = OrderedDict()
    opened = 0
    for shard in shards_of(make([size] * count), [size] * count).tolist():
        opened += shard not in kept
        kept[shard] = None
        kept.move_to_end(shard)
        if len(kept) > 512:  # as many as SampleReader keeps
            kept.popitem(last=False)
    assert count <= opened <= count + borders


def test_a_shard_is_visited_in_one_stretch_of_a_lane() -> None:
    shards = shards_of(make([700] * 300), [700] * 300)
    lanes, turns = np.arange(len(shards)) % LANES, np.arange(len(shards)) // LANES // BLOCK
    for shard in range(300):
        found = shards == shard
        assert np.ptp(lanes[found]) <= 1  # a lane holds three shards
        for lane in np.unique(lanes[found]):
            assert np.ptp(turns[found & (lanes == lane)]) <= 1  # 700 samples touch two blocks


@pytest.mark.parametrize("world_size", [2, 3, 8, 96])
def test_ranks_share_shards_at_lane_borders_only(world_size: int) -> None:
    shards = shards_of(make([1000] * 150), [1000] * 150)
    batch = 4 * world_size
    read = [
        {
            int(shards[position])
            for start in range(0, len(shards), batch)
            for position in rank_positions(start, min(start + batch, len(shards)), rank, world_size)
        }
        for rank in range(world_size)
    ]
    assert set().union(*read) == set(range(150))
    assert sum(map(len, read)) <= 150 + LANES - 1


def test_shards_that_a_draw_leaves_out_are_not_visited() -> None:
    sizes = [10] * 40
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    subset = np.arange(100, 300)
    with small_lanes():
        order = Order(Natural(400, subset, name="some"), starts, 0)
        assert len(order) == 200
        assert sorted(epoch_of(order)) == subset.tolist()


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=200),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 20),
)
def test_an_epoch_holds_what_is_drawn_as_often_as_it_is_drawn(
    labels: list[int], seed: int, epoch: int
) -> None:
    draw = Weighted(
        np.arange(len(labels)),
        np.array(labels, dtype=np.int32),
        sampling="balanced",
        seed=seed,
        name="all",
    )
    starts = np.unique([0, *range(0, len(labels), 13), len(labels)])
    with small_lanes(lanes=3, block=4):
        found = epoch_of(Order(draw, starts, seed), epoch)
    assert sorted(found) == draw.places(epoch).tolist()


def test_a_name_says_draw_and_version() -> None:
    assert make([3]).name == "lanes-1 natural all"


# ------------------------------------------------------------------------- places and ranks


@given(start=st.integers(0, 40), length=st.integers(0, 60), world_size=st.integers(1, 16))
def test_ranks_share_positions_exactly(start: int, length: int, world_size: int) -> None:
    shares = [
        list(rank_positions(start, start + length, rank, world_size)) for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(start, start + length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(count=st.integers(0, 10_000), samples=st.integers(1, 300))
def test_a_place_is_epoch_and_remainder(count: int, samples: int) -> None:
    place = Position.at(count, samples)
    assert place.epoch * samples + place.position == count
    assert place.position < samples


@pytest.mark.parametrize("parts", [(0,), (1, 2), (2, 1), (-1,), (2**64,)])
def test_hashes_tell_arguments_apart(parts: tuple[int, ...]) -> None:
    assert stable_hash(*parts) != stable_hash(*parts, 0)
    assert stable_hash(1, 2) != stable_hash(2, 1)
