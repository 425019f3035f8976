from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmkd_scale.memory.one_class import Recipe, describe_class
from cmkd_scale.memory.statistics import Moments
from tests.memory.examples import (
    batches_of,
    build_from,
    build_with,
    first_of_each_class,
    spool_of,
    teacher_data,
)


@pytest.mark.parametrize("count", [7, 200])
def test_the_spread_keeps_its_bits_far_from_the_origin(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = 300.0 + 0.01 * torch.randn(count, 16, generator=generator)
    recipe = Recipe(torch.randn(3, 16, generator=generator), torch.zeros(3), 4.0)
    rows = describe_class(0, features, Moments(1, 16).tensors(), recipe)
    centres = rows["prototypes"].double().numpy()
    apart = np.linalg.norm(features.double().numpy()[:, None] - centres[None], axis=2)
    np.testing.assert_allclose(rows["spread"], apart.mean(1), rtol=1e-3)


def test_a_factor_of_the_kept_samples_stays_within_the_variance_of_all() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias, limit=3)
    left = memory.class_variance.double() - memory.class_factor.double().square().sum(1)
    assert float(left.min()) >= 0.0
    kept = first_of_each_class(labels, 3)
    for label in range(6):
        chosen = features[kept & (labels == label)].double().numpy()
        variance = features[labels == label].double().numpy().var(0)
        found = chosen.var(0)  # three samples span two directions, so the factor is complete
        expected = np.cov(chosen.T, bias=True)
        scale = np.sqrt(np.minimum(1.0, variance / found))
        factor = memory.class_factor[label].double().numpy()
        np.testing.assert_allclose(
            factor.T @ factor, expected * scale[:, None] * scale[None], atol=1e-5
        )


def test_a_class_that_has_lost_its_samples_stays_as_it_was() -> None:
    features, labels, weight, bias = teacher_data()
    there = labels != 4
    before = build_from(features[there], labels[there], weight, bias)
    moved, there = features + 0.1, labels != 1
    for rank in (2, 4, 6):
        after = build_with(
            spool_of(batches_of(moved[there], labels[there])),
            -weight,
            bias,
            covariance_rank=rank,
            previous=before,
        )
        counts = after.prototype_class.bincount(minlength=6)
        old = before.prototype_class.bincount(minlength=6)
        # Only class 4, which is new, changes the number of prototypes.
        assert counts[4] == 4
        assert torch.equal(counts[[0, 1, 2, 3, 5]], old[[0, 1, 2, 3, 5]])
        for name in ("prototypes", "prototype_mass", "radius"):
            one, other = (getattr(m, name)[m.prototype_class == 1] for m in (before, after))
            assert torch.equal(one, other)
        for name in ("class_mean", "class_variance", "class_count", "class_kept"):
            assert torch.equal(getattr(after, name)[1], getattr(before, name)[1])
        assert after.class_factor.shape == (6, rank, 8)
        assert torch.equal(after.class_factor[1, :4], before.class_factor[1, :rank])
        own = after.prototype_class == 1
        says = torch.softmax((after.prototypes[own] @ -weight.T + bias) / 4.0, 1)
        torch.testing.assert_close(after.soft_label_values[own], says)


def test_a_class_of_which_no_sample_is_kept_stays_as_it_was() -> None:
    features, labels, weight, bias = teacher_data()
    before = build_from(features, labels, weight, bias)
    batches = [
        replace(batch, kept=batch.kept & (batch.labels != 2))
        for batch in batches_of(features + 0.1, labels)
    ]
    after = build_with(spool_of(batches), weight, bias, previous=before)
    assert torch.equal(after.prototype_class, before.prototype_class)
    assert torch.equal(after.class_mean[2], before.class_mean[2])
    assert int(after.class_kept[2]) == 24
