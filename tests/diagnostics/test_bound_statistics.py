"""Intervals, null and noise floor against formulas and repeated measurement."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations as orders

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from cmkd_scale.diagnostics.bound import BoundInputs, bound_report
from cmkd_scale.diagnostics.bound_inputs import sides_of
from cmkd_scale.diagnostics.bound_statistics import (
    Measured,
    confident,
    intervals,
    noise_floor,
    permutation_null,
)
from tests.diagnostics.examples import QUICK, make


def measured(inputs: BoundInputs) -> Measured:
    return sides_of(inputs).measured


def test_intervals_of_means_are_as_wide_as_the_formula_says() -> None:
    inputs = make(1, classes=3, samples=240)
    sides = measured(inputs)
    found = intervals(sides, seed=0, draws=4000)
    crossed = confident(sides.crossed)
    columns = {
        "risk": sides.own,
        "label_gap": sides.own - crossed,
        "transfer_gap": crossed,
        "teacher_cross_entropy": sides.crossed,
    }
    for name, values in columns.items():
        # The class frequencies do not vary, so only the spread within classes counts.
        variance = sum(
            np.sum(sides.labels == y) * values[sides.labels == y].var() for y in range(3)
        )
        low, high = found[name]
        assert high - low == pytest.approx(2 * 1.96 * np.sqrt(variance) / 240, rel=0.06)
        shift = found["teacher_term"][0] if name == "transfer_gap" else 0.0
        assert (low + high) / 2 == pytest.approx(values.mean() - shift, abs=(high - low) / 20)


def test_the_interval_of_a_distance_is_that_of_resampling_in_loops() -> None:
    inputs = make(2, classes=2, samples=40, scale=2.0)
    sides = measured(inputs)
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(1500):
        total = 0.0
        for y in range(2):
            own = sides.crossed[sides.labels == y]
            theirs = sides.teacher_class == y
            again = rng.choice(own, len(own))
            mass = sides.teacher_mass[theirs]
            distance = wasserstein_distance(again, sides.teacher[theirs], None, mass)
            total += len(own) / 40 * distance
        drawn.append(total)
    value = bound_report(inputs, **QUICK)["bounds"]["U3"]["value"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = intervals(sides, seed=0, draws=3000)["U3"]
    width = high - low
    assert found == pytest.approx((2 * value - high, 2 * value - low), abs=0.1 * width)
    assert intervals(sides, seed=0, draws=50) == intervals(sides, seed=0, draws=50)
    assert intervals(sides, seed=0, draws=50) != intervals(sides, seed=1, draws=50)


def test_an_interval_of_u3_corrects_what_small_samples_add() -> None:
    # Student and teacher are alike, so the distance is 0, and that of samples is not.
    values = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(40) % 2
        alike = {
            "features": torch.randn(40, 3, generator=g),
            "labels": labels,
            "logits": torch.zeros(40, 2),
            "teacher_features": torch.randn(100, 3, generator=g),
            "teacher_labels": torch.arange(100) % 2,
        }
        report = bound_report(replace(make(3, classes=2), **alike), draws=200, permutations=1)
        values.append(report["bounds"]["U3"])
    assert np.mean([bound["low"] for bound in values]) < 0.35 * np.mean(
        [bound["value"] for bound in values]
    )
    assert all(0 <= bound["low"] <= bound["high"] for bound in values)


def renamed(inputs: BoundInputs, order: list[int]) -> BoundInputs:
    """The teacher of which class ``order[y]`` is called y: its prototypes and its head."""
    name_of: Tensor = torch.tensor(order).argsort()
    return replace(
        inputs,
        prototype_class=name_of[inputs.prototype_class],
        head_weight=inputs.head_weight[order],
        head_bias=inputs.head_bias[order],
    )


def test_the_null_is_the_report_of_teachers_with_other_names() -> None:
    inputs = make(4, classes=3, samples=60, scale=2.0)
    distances, gaps = [], []
    for order in orders(range(3)):
        report = bound_report(renamed(inputs, list(order)), **QUICK)
        distances.append(report["bounds"]["U3"]["value"])
        gaps.append(report["transfer_gap"]["value"])
    null = permutation_null(measured(inputs), seed=0, permutations=3000)
    # With so many draws the quantiles are those of the rarest permutations.
    assert null["U3"]["low"] == pytest.approx(min(distances), abs=1e-10)
    assert null["U3"]["high"] == pytest.approx(max(distances), abs=1e-10)
    assert null["U3"]["value"] == pytest.approx(np.mean(distances), rel=0.03)
    assert null["transfer_gap"]["low"] == pytest.approx(min(gaps), abs=1e-10)
    assert null["transfer_gap"]["high"] == pytest.approx(max(gaps), abs=1e-10)
    smaller = np.mean(np.array(distances) <= distances[0] + 1e-12)
    assert null["p_value"] == pytest.approx(smaller, abs=0.03)


def test_a_teacher_that_fits_is_told_from_its_permutations() -> None:
    centres = 4 * torch.eye(8)
    labels = torch.arange(80) % 8
    g = torch.Generator().manual_seed(5)
    inputs = replace(
        make(5, classes=8, dim=8),
        features=centres[labels] + torch.randn(80, 8, generator=g),
        logits=torch.zeros(80, 8),
        labels=labels,
        prototypes=centres,
        prototype_class=torch.arange(8),
        prototype_mass=torch.ones(8),
        head_weight=centres,
        head_bias=torch.zeros(8),
    )
    report = bound_report(inputs)
    assert report["null"]["p_value"] == pytest.approx(1 / 201)
    assert report["bounds"]["U3"]["value"] < 0.2 * report["null"]["U3"]["low"]
    turned = replace(inputs, labels=(labels + 1) % 8)
    assert bound_report(turned)["null"]["p_value"] > 0.2


def test_the_noise_floor_is_the_distance_of_halves() -> None:
    # Two points a class: each half is one of them, whatever their masses.
    owners = torch.tensor([0, 0, 1, 1, 2])
    inputs = replace(
        make(6, classes=3),
        prototypes=torch.randn(5, 3, generator=torch.Generator().manual_seed(6)),
        prototype_class=owners,
        prototype_mass=torch.tensor([0.9, 0.1, 0.5, 0.5, 1.0]),
    )
    sides = measured(inputs)
    losses = sides.teacher
    share = sides.share[:2] / sides.share[:2].sum()  # the third class has no halves
    expected = share[0] * abs(losses[0] - losses[1]) + share[1] * abs(losses[2] - losses[3])
    floor = noise_floor(sides, seed=0)
    assert floor is not None
    assert [floor[key] for key in ("value", "low", "high")] == pytest.approx([expected] * 3)
    single = replace(
        inputs,
        prototypes=inputs.prototypes[[0, 2, 4]],
        prototype_class=owners[[0, 2, 4]],
        prototype_mass=torch.ones(3),
    )
    assert noise_floor(measured(single), seed=0) is None
    assert bound_report(single, **QUICK)["noise_floor"] is None


def test_the_noise_floor_of_many_samples_is_low() -> None:
    inputs = make(7, classes=2)
    floors = []
    for size in (20, 2000):
        g = torch.Generator().manual_seed(size)
        features, labels = torch.randn(size, 3, generator=g), torch.arange(size) % 2
        sampled = replace(inputs, teacher_features=features, teacher_labels=labels)
        floor = noise_floor(measured(sampled), seed=0)
        assert floor is not None
        assert floor["low"] <= floor["value"] <= floor["high"]
        floors.append(floor["value"])
    assert 5 < floors[0] / floors[1] < 20  # as the square root of 100
