from __future__ import annotations

import numpy as np
import pytest
import torch

from cmkd_scale.memory.alignment import align_to_student
from cmkd_scale.memory.moving import MovingMemory
from tests.conftest import REPOSITORY, Launch
from tests.memory.examples import build_from, teacher_data

SCRIPT = REPOSITORY / "tests" / "scripts" / "moving_memory.py"


def test_a_pass_is_one_step_of_lloyds_algorithm() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    moved = features + 0.5 * noise
    moving = MovingMemory(memory, every=3, weight_of_before=0.0)
    for rows in torch.arange(len(labels)).tensor_split(3):
        assert not moving.due
        moving.observe(moved[rows], labels[rows])
    assert moving.due
    after = moving.follow(weight, bias)
    assert not moving.due
    assert torch.equal(after.prototype_class, memory.prototype_class)
    values, truth = moved.double().numpy(), labels.numpy()
    for label in range(6):
        own = (memory.prototype_class == label).numpy()
        mine, centres = values[truth == label], memory.prototypes.double().numpy()[own]
        apart = np.linalg.norm(mine[:, None] - centres[None], axis=2)
        nearest = apart.argmin(1)
        shares = np.bincount(nearest, minlength=len(centres)) / len(mine)
        np.testing.assert_allclose(after.prototype_mass.numpy()[own], shares, atol=1e-6)
        for k in range(len(centres)):
            expected = mine[nearest == k].mean(0) if shares[k] > 0 else centres[k]
            np.testing.assert_allclose(after.prototypes.numpy()[own][k], expected, atol=1e-5)
            if shares[k] > 0:
                radius = apart[nearest == k, k].mean()
                assert float(after.radius[own][k]) == pytest.approx(radius, abs=1e-4)
        np.testing.assert_allclose(after.class_mean[label], mine.mean(0), atol=1e-6)
        np.testing.assert_allclose(after.class_variance[label], mine.var(0), atol=1e-5)
    soft = torch.softmax((after.prototypes @ weight.T + bias) / 4.0, 1)
    torch.testing.assert_close(after.soft_label_values, soft)


def test_the_memory_keeps_up_with_a_teacher_that_turns() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1)
    angle = torch.tensor(0.05)
    turn = torch.eye(8)
    turn[:2, :2] = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    now = features
    for _ in range(30):  # 86 degrees in all
        now, weight = now @ turn.T, weight @ turn.T
        moving.observe(now, labels)
        after = moving.follow(weight, bias)

    def distortion(prototypes: torch.Tensor) -> float:
        apart = torch.cdist(now, prototypes)
        apart[labels.unsqueeze(1) != memory.prototype_class] = torch.inf
        return float(apart.min(1).values.square().mean())

    fresh = build_from(now, labels, weight, bias)
    assert distortion(after.prototypes) < 1.1 * distortion(fresh.prototypes)
    assert distortion(memory.prototypes) > 1.5 * distortion(fresh.prototypes)
    guesses = (after.prototypes @ after.head_weight.T).argmax(1)
    assert float((guesses == after.prototype_class).float().mean()) > 0.8


def test_classes_that_were_not_seen_stay_as_they_were() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1)
    seen = labels != 3
    moving.observe(features[seen] + 5.0, labels[seen])
    after = moving.follow(weight, bias)
    own = memory.prototype_class == 3
    assert torch.equal(after.prototypes[own], memory.prototypes[own])
    assert torch.equal(after.prototype_mass[own], memory.prototype_mass[own])
    assert torch.equal(after.class_mean[3], memory.class_mean[3])
    assert not torch.equal(after.class_mean[2], memory.class_mean[2])


@pytest.mark.parametrize("weight_of_before", [0.3, 1.0])
def test_the_memory_counts_for_the_samples_it_was_built_from(weight_of_before: float) -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moved = features[:70] + 0.4
    moving = MovingMemory(memory, every=1, weight_of_before=weight_of_before)
    moving.observe(moved, labels[:70])
    after = moving.follow(weight, bias)
    for label in range(6):
        old, new = (
            x.double().numpy() for x in (features[labels == label], moved[labels[:70] == label])
        )
        both = np.concatenate([old, new])
        weights = np.r_[np.full(len(old), weight_of_before), np.ones(len(new))]
        mean = np.average(both, axis=0, weights=weights)
        variance = np.average((both - mean) ** 2, axis=0, weights=weights)
        np.testing.assert_allclose(after.class_mean[label], mean, atol=1e-5)
        np.testing.assert_allclose(after.class_variance[label], variance, atol=1e-5)
        own = (memory.prototype_class == label).numpy()
        centres = memory.prototypes.double().numpy()[own]
        apart = np.linalg.norm(new[:, None] - centres[None], axis=2)
        before = weight_of_before * len(old) * memory.prototype_mass.double().numpy()[own]
        for k in range(len(centres)):
            mine = apart.argmin(1) == k
            total = before[k] + mine.sum()
            expected = (before[k] * centres[k] + new[mine].sum(0)) / total
            np.testing.assert_allclose(after.prototypes.numpy()[own][k], expected, atol=1e-5)
            mass = total / weights.sum()
            assert float(after.prototype_mass[own][k]) == pytest.approx(mass, abs=1e-6)
            radius = (before[k] * float(memory.radius[own][k]) + apart[mine, k].sum()) / total
            assert float(after.radius[own][k]) == pytest.approx(radius, abs=1e-5)


def test_one_sample_moves_little() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1)
    first = (labels == 0).nonzero()[:1, 0]
    moving.observe(features[first], labels[first])
    after = moving.follow(weight, bias)
    torch.testing.assert_close(after.prototype_mass, memory.prototype_mass, atol=1 / 30, rtol=0)
    torch.testing.assert_close(after.class_variance, memory.class_variance, atol=0.0, rtol=0.2)
    assert float((after.class_mean - memory.class_mean).norm()) < 0.2
    # What was observed is used once.
    again = moving.follow(weight, bias)
    assert again.digest() == after.digest()


def test_factors_never_say_more_than_the_variance() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1, weight_of_before=0.0)
    seen = labels < 4
    moving.observe(0.3 * features[seen], labels[seen])
    after = moving.follow(weight, bias)
    left = after.class_variance.double() - after.class_factor.double().square().sum(1)
    assert float(left.min()) >= 0.0
    assert torch.equal(after.class_factor[4:], memory.class_factor[4:])


def test_the_unit_of_cost_follows_a_teacher_whose_features_grow() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    moving = MovingMemory(memory, every=1, weight_of_before=0.0)
    now = features
    for _ in range(40):
        now = 1.03 * now
        moving.observe(now, labels)
        after = moving.follow(weight, bias)
    fresh = build_from(now, labels, weight, bias)
    assert float(fresh.cost_scale) > 3.0 * float(memory.cost_scale)
    assert float(after.cost_scale) == pytest.approx(float(fresh.cost_scale), rel=0.15)


def test_classes_without_prototypes_get_no_probability() -> None:
    features, labels, weight, bias = teacher_data()
    built = build_from(features, labels, weight, bias)
    memory = align_to_student(built, ["class 0", "new", "class 1"])
    moving = MovingMemory(memory, every=1)
    names = torch.tensor([0, 2, 1, 1, 1, 1])  # other classes have no prototypes here
    moving.observe(features, names[labels])
    after = moving.follow(memory.head_weight, memory.head_bias)
    assert after.soft_label_values[:, 1].abs().max() == 0.0
    torch.testing.assert_close(after.soft_label_values.sum(1), torch.ones(len(after.prototypes)))


@pytest.mark.multirank
def test_the_moved_memory_is_the_same_bits_on_every_world(launch: Launch) -> None:
    digests = set()
    for processes in (1, 2, 3):
        printed = launch(SCRIPT, processes=processes).stdout.split()
        assert len(printed) == processes
        digests.update(printed)
    assert len(digests) == 1
