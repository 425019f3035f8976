from __future__ import annotations

import numpy as np
import pytest
import torch

from cmkd_scale.errors import UsageError
from tests.conftest import REPOSITORY, Launch
from tests.memory.examples import build_from, example_memory, teacher_data

SCRIPT = REPOSITORY / "tests" / "scripts" / "memory_digest.py"


@pytest.mark.multirank
def test_the_digest_is_the_same_for_every_world_size_and_order(launch: Launch) -> None:
    digests = set()
    for processes in (1, 2, 3):
        done = launch(SCRIPT, processes=processes)
        lines = [line for line in done.stdout.splitlines() if line.startswith("digest")]
        assert len(lines) == 2 * processes
        digests.update(lines)
    assert len(digests) == 1


def test_fields_against_a_direct_computation() -> None:
    features, labels, weight, bias = teacher_data()
    memory = build_from(features, labels, weight, bias)
    values, truth = features.double().numpy(), labels.numpy()
    soft = torch.softmax((features @ weight.T + bias) / 4.0, 1).numpy()
    for label in range(6):
        own = (memory.prototype_class == label).numpy()
        members = values[truth == label]
        centres = memory.prototypes.numpy()[own]
        nearest = np.linalg.norm(members[:, None] - centres[None], axis=2)
        assignment = nearest.argmin(1)
        shares = np.bincount(assignment, minlength=len(centres)) / len(members)
        np.testing.assert_allclose(memory.prototype_mass.numpy()[own], shares, atol=1e-6)
        for k in range(len(centres)):
            mine = assignment == k
            np.testing.assert_allclose(
                memory.soft_labels.numpy()[own][k], soft[truth == label][mine].mean(0), atol=1e-5
            )
            np.testing.assert_allclose(
                memory.radius.numpy()[own][k], nearest[mine, k].mean(), atol=1e-4
            )
        np.testing.assert_allclose(memory.class_mean[label], members.mean(0), atol=1e-6)
        np.testing.assert_allclose(memory.class_variance[label], members.var(0), atol=1e-5)
    assert memory.class_count.tolist() == [30, 27, 24, 21, 18, 15]
    torch.testing.assert_close(memory.class_risk, torch.full((6,), 0.5))
    assert float(memory.cost_scale) > 0


def test_a_class_without_samples_has_no_prototype_and_is_told_apart() -> None:
    features, labels, weight, bias = teacher_data()
    kept = labels != 2
    memory = build_from(features[kept], labels[kept], weight, bias)
    assert 2 not in memory.prototype_class.tolist()
    assert int(memory.class_count[2]) == 0
    assert torch.isnan(memory.class_risk[2])


def test_nothing_to_build_from() -> None:
    features, labels, weight, bias = teacher_data()
    with pytest.raises(UsageError, match="no labelled sample"):
        build_from(features[:0], labels[:0], weight, bias)


def test_masses_sum_to_one_in_each_class() -> None:
    memory = example_memory()
    sums = torch.zeros(6).index_add_(0, memory.prototype_class, memory.prototype_mass)
    torch.testing.assert_close(sums, torch.ones(6))
    torch.testing.assert_close(memory.soft_labels.sum(1), torch.ones(len(memory.prototypes)))
