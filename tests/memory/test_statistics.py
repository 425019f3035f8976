from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmkd_scale.errors import IntegrityError
from cmkd_scale.memory.statistics import Moments, refuse_diverged


def samples(count: int, seed: int, classes: int = 4, dim: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    features = 3.0 * torch.randn(count, dim, generator=generator) + 1.0
    return features, torch.randint(classes, (count,), generator=generator)


def test_moments_equal_float64_on_the_union() -> None:
    features, labels = samples(400, seed=0)
    moments = Moments(5, 3)  # class 4 is empty
    for start in range(0, 400, 37):
        moments.update(features[start : start + 37], labels[start : start + 37])
    values, truth = features.double().numpy(), labels.numpy()
    for label in range(4):
        members = values[truth == label]
        np.testing.assert_allclose(moments.mean()[label], members.mean(0), atol=1e-6)
        np.testing.assert_allclose(moments.variance()[label], members.var(0), atol=1e-6)
        assert int(moments.count[label]) == len(members)
    assert moments.mean()[4].tolist() == [0.0] * 3
    assert moments.variance()[4].tolist() == [0.0] * 3


@given(
    order=st.permutations(list(range(24))),
    cuts=st.lists(st.integers(0, 24), max_size=5),
)
def test_any_order_and_any_split_give_the_same_bits(order: list[int], cuts: list[int]) -> None:
    features, labels = samples(24, seed=1)
    whole = Moments(4, 3)
    whole.update(features, labels)
    merged = Moments(4, 3)
    bounds = [0, *sorted(cuts), 24]
    for start, stop in itertools.pairwise(bounds):
        part = Moments(4, 3)
        chosen = torch.tensor(order[start:stop], dtype=torch.int64)
        part.update(features[chosen], labels[chosen])
        for mine, other in zip(merged.tensors(), part.tensors(), strict=True):
            mine += other
    for one, other in zip(whole.tensors(), merged.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 5000.0])
def test_a_diverged_teacher_is_refused(bad: float) -> None:
    with pytest.raises(IntegrityError, match="diverged"):
        Moments(2, 2).update(torch.tensor([[0.0, bad]]), torch.tensor([0]))
    with pytest.raises(IntegrityError, match=r"diverged.*pretrained.*project"):
        refuse_diverged(torch.tensor([bad]))
    with pytest.raises(IntegrityError, match=r"cross-entropy on held-out .* diverged"):
        Moments(1, 1, of="losses").update(torch.tensor([[bad]]), torch.tensor([0]))


def large(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 4000.0 + 10.0 * torch.randn(count, 1, generator=generator)


def test_sums_up_to_64_bits_are_exact() -> None:
    values, labels = large(34_000), torch.zeros(34_000, dtype=torch.int64)
    moments = Moments(1, 1)
    for rows in torch.arange(34_000).split(10_000):
        moments.update(values[rows], labels[rows])
    assert float(moments.variance()) == pytest.approx(values.double().var(correction=0).item())


def test_squares_that_64_bits_cannot_hold_are_refused() -> None:
    values, labels = large(40_000), torch.zeros(40_000, dtype=torch.int64)
    with pytest.raises(IntegrityError, match=r"so many samples .* Normalise"):
        Moments(1, 1).update(values, labels)
    halves = [Moments(1, 1), Moments(1, 1)]
    for moments, rows in zip(halves, torch.arange(40_000).split(20_000), strict=True):
        moments.update(values[rows], labels[rows])
    whole = Moments(3, 1)
    whole.add_rows(torch.tensor([2]), *halves[0].tensors())
    with pytest.raises(IntegrityError, match="so many samples"):
        whole.add_rows(torch.tensor([2]), *halves[1].tensors())
    # Five halves wrap to a positive number.
    rows = [sums.expand(5, *sums.shape[1:]) for sums in halves[0].tensors()]
    with pytest.raises(IntegrityError, match="so many samples"):
        Moments(3, 1).add_rows(torch.tensor([0] * 5), *rows)
    # Small features of many samples are no reason.
    many = Moments(3, 1)
    many.add_rows(torch.tensor([0]), torch.tensor([10**9]), *halves[0].tensors()[1:])
    many.update(values[:10], labels[:10])


def test_parts_that_will_be_added_hold_their_share() -> None:
    values, labels = large(34_000), torch.zeros(34_000, dtype=torch.int64)
    Moments(1, 1, parts=2).update(values[:17_000], labels[:17_000])
    with pytest.raises(IntegrityError, match="so many samples"):
        Moments(1, 1, parts=2).update(values[:18_000], labels[:18_000])


def test_sums_of_classes_may_come_in_any_order_and_repeat() -> None:
    features, labels = samples(60, seed=2)
    whole, merged = Moments(4, 3), Moments(4, 3)
    whole.update(features, labels)
    for chosen in (slice(0, 20), slice(20, 60)):
        part = Moments(4, 3)
        part.update(features[chosen], labels[chosen])
        order = torch.tensor([2, 0, 3, 1])
        merged.add_rows(order, *(sums[order] for sums in part.tensors()))
    for one, other in zip(whole.tensors(), merged.tensors(), strict=True):
        assert torch.equal(one, other)
