from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.memory.student_statistics import StudentStatistics

CLASSES, DIM = 4, 3


def batches(seed: int, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            3.0 + torch.randn(size, DIM, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_without_forgetting_moments_are_those_of_all_samples(seed: int, sizes: list[int]) -> None:
    statistics = StudentStatistics(CLASSES, DIM, ring_size=0, decay=1.0)
    data = batches(seed, sizes)
    for step, (features, labels) in enumerate(data):
        statistics.update(features, labels, step)
    values = torch.cat([features for features, _ in data]).double().numpy()
    truth = torch.cat([labels for _, labels in data]).numpy()
    for label in range(CLASSES):
        mine = values[truth == label]
        assert float(statistics.weight[label]) == len(mine)
        if len(mine):
            np.testing.assert_allclose(statistics.mean[label], mine.mean(0), atol=1e-5)
            np.testing.assert_allclose(statistics.variance[label], mine.var(0), atol=2e-5)


def test_forgetting_weights_samples_by_their_age() -> None:
    statistics = StudentStatistics(CLASSES, DIM, ring_size=0, decay=0.5)
    data = batches(1, [40, 40, 40])
    for step, (features, labels) in enumerate(data):
        statistics.update(features, labels, step)
    label = 2
    rows = [(f[y == label].double().numpy(), 0.5 ** (2 - age)) for age, (f, y) in enumerate(data)]
    values = np.concatenate([row for row, _ in rows])
    weights = np.concatenate([np.full(len(row), weight) for row, weight in rows])
    mean = np.average(values, axis=0, weights=weights)
    np.testing.assert_allclose(statistics.mean[label], mean, atol=1e-5)
    variance = np.average((values - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(statistics.variance[label], variance, atol=1e-5)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_the_ring_holds_the_newest_and_knows_their_age(seed: int, sizes: list[int]) -> None:
    statistics = StudentStatistics(CLASSES, DIM, ring_size=16, decay=1.0)
    data = batches(seed, sizes)
    for step, (features, labels) in enumerate(data):
        statistics.update(features, labels, step)
    newest = torch.cat([features for features, _ in data])[-16:]
    steps = torch.cat([torch.full((size,), step) for step, size in enumerate(sizes)])[-16:]
    features, labels = statistics.recent()
    # The ring has no beginning: compare as sets of rows.
    assert sorted(map(tuple, features.tolist())) == sorted(map(tuple, newest.tolist()))
    assert len(labels) == len(newest)
    expected = (len(sizes) - steps.double()).mean()
    torch.testing.assert_close(statistics.age(len(sizes)).double(), expected, atol=1e-5, rtol=0)


def test_an_empty_ring_has_no_age() -> None:
    statistics = StudentStatistics(CLASSES, DIM, ring_size=4, decay=1.0)
    assert float(statistics.age(7)) == 0.0
    assert len(statistics.recent()[0]) == 0


def test_state_goes_through_a_checkpoint() -> None:
    one = StudentStatistics(CLASSES, DIM, ring_size=8, decay=0.9)
    other = StudentStatistics(CLASSES, DIM, ring_size=8, decay=0.9)
    data = batches(3, [5, 6, 7])
    for step, (features, labels) in enumerate(data[:2]):
        one.update(features, labels, step)
    other.load_state_dict(one.state_dict())
    for statistics in (one, other):
        statistics.update(*data[2], 2)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
