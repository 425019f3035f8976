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
    with pytest.raises(IntegrityError, match="diverged"):
        refuse_diverged(torch.tensor([bad]))


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
