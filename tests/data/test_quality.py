from __future__ import annotations

import itertools

import numpy as np
import pytest

from cmkd_scale.data.quality import same_shard, shared_shards


def starts(*counts: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.cumsum([0, *counts], dtype=np.int64)


def test_the_chance_is_that_of_counting_pairs() -> None:
    shards = np.random.default_rng(0).integers(0, 5, (7, 12))
    pairs = [a == b for row in shards for a, b in itertools.combinations(row.tolist(), 2)]
    assert same_shard(shards) == pytest.approx(np.mean(pairs))


def test_a_small_data_set_is_mixed_like_a_uniform_permutation() -> None:
    assert shared_shards(starts(*[1000] * 60)) == pytest.approx(1.0, abs=0.05)


def test_a_large_one_is_mixed_over_many_shards() -> None:
    # Below the number of lanes, no two samples of a batch are of one lane.
    assert shared_shards(starts(*[1000] * 300), batch_size=96) < 1.0
    assert 1.0 < shared_shards(starts(*[1000] * 1000)) < 6.0


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (2,), (0, 5, 0)])
def test_degenerate_splits_have_a_number(counts: tuple[int, ...]) -> None:
    assert shared_shards(starts(*counts)) == pytest.approx(1.0, abs=1.0)
