from __future__ import annotations

import numpy as np
import pytest
import torch

from cmkd_scale.memory.moving import MovingMemory
from tests.conftest import REPOSITORY, Launch
from tests.memory.examples import build_from, teacher_data

SCRIPT = REPOSITORY / "tests" / "scripts" / "moving_memory.py"


def test_a_pass_is_one_step_of_lloyds_algorithm() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(9))
    moved = features + 0.5 * noise
    moving = MovingMemory(memory, every=3)
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


@pytest.mark.multirank
def test_the_moved_memory_is_the_same_bits_on_every_world(launch: Launch) -> None:
    digests = set()
    for processes in (1, 2, 3):
        printed = launch(SCRIPT, processes=processes).stdout.split()
        assert len(printed) == processes
        digests.update(printed)
    assert len(digests) == 1
