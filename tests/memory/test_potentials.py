from __future__ import annotations

import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses.sinkhorn import semi_dual_plan
from cmkd_scale.memory.potentials import Optimizer, Potentials
from tests.conftest import REPOSITORY, Launch

SCRIPT = REPOSITORY / "tests" / "scripts" / "potentials.py"


def make(mass: list[float], classes: list[int], **options: Any) -> Potentials:
    count = torch.full((max(classes) + 1,), 10)
    defaults: dict[str, Any] = {"rate": 0.1, "optimizer": "sgd"}
    return Potentials(torch.tensor(mass), torch.tensor(classes), count, **{**defaults, **options})


def ascend(
    potentials: Potentials, cost: Tensor, labels: Tensor, epsilon: float, steps: int
) -> tuple[Tensor, list[float]]:
    """Across classes, on a fixed problem; the last plan and the marginal errors."""
    share = torch.ones(len(cost))
    errors = []
    for _ in range(steps):
        plan = semi_dual_plan(cost, potentials.target().log(), potentials.current, epsilon)
        sent = potentials.sent_to_all(plan, labels, share)
        potentials.observe(sent)
        potentials.update(sent, within_classes=False)
        errors.append(float(potentials.marginal_error(within_classes=False)))
    return plan, errors


@pytest.mark.parametrize("optimizer", ["sgd", "averaged"])
def test_ascent_within_classes_reaches_their_masses(optimizer: Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    masses = [0.7, 0.3, 0.5, 0.25, 0.25]
    potentials = make(masses, [0, 0, 1, 1, 1], rate=0.1, optimizer=optimizer)
    columns = torch.tensor([[0, 1, 0], [2, 3, 4]])
    log_mass = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25]]).log()
    prototypes = torch.randn(5, 2, generator=generator)
    # Nine times as many samples of class 0: masses are shares of a class, so this must not
    # send any mass across.
    labels = torch.tensor([0] * 90 + [1] * 10)
    features = torch.randn(100, 2, generator=generator)
    cost = (features.unsqueeze(1) - prototypes[columns[labels]]).norm(dim=2)
    share, errors = torch.ones(100), []
    for _ in range(2000):
        current = potentials.current[columns[labels]]
        plan = semi_dual_plan(cost, log_mass[labels], current, epsilon=0.1)
        sent = potentials.sent_within_classes(plan, columns[labels], labels, share)
        potentials.observe(sent)
        potentials.update(sent, within_classes=True)
        errors.append(float(potentials.marginal_error(within_classes=True)))
    assert errors[-1] < 0.01 < errors[0]
    received = sent[:5] / sent[5:][torch.tensor([0, 0, 1, 1, 1])]
    torch.testing.assert_close(received, torch.tensor(masses), atol=0.01, rtol=0)


def test_absent_classes_and_unknown_samples_move_nothing() -> None:
    potentials = make([1.0, 0.5, 0.5], [0, 1, 1], rate=1.0)
    plan = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    columns = torch.tensor([[0, 0], [1, 2]])
    sent = potentials.sent_within_classes(
        plan, columns, torch.tensor([0, 1]), torch.tensor([1.0, 0.0])
    )
    potentials.update(sent, within_classes=True)
    assert potentials.value.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("optimizer", ["sgd", "averaged"])
def test_the_semi_dual_ends_at_sinkhorns_plan(optimizer: Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(24, 6, generator=generator)
    labels = torch.arange(24) % 2
    mass = [0.5, 0.3, 0.2, 0.6, 0.3, 0.1]
    potentials = make(mass, [0, 0, 0, 1, 1, 1], rate=0.1, optimizer=optimizer)
    plan, errors = ascend(potentials, cost, labels, 0.05, 4000)
    assert errors[-1] < 2e-3
    target = np.array(mass) / 2
    reference = ot.sinkhorn(
        np.full(24, 1 / 24),
        target / target.sum(),
        cost.double().numpy(),
        0.05,
        method="sinkhorn_log",
    )
    np.testing.assert_allclose(plan.numpy() / 24, reference, atol=3e-4)


def test_unbalanced_masses_agree_with_pot() -> None:
    generator = torch.Generator().manual_seed(2)
    cost = torch.rand(20, 5, generator=generator)
    cost[:, 0] += 1.0  # far from everything: an unbalanced problem sends less there
    potentials = make([0.2] * 5, [0] * 5, rate=0.02, relaxation=0.3)
    plan, _ = ascend(potentials, cost, torch.zeros(20, dtype=torch.int64), 0.05, 6000)
    # Rows hold exactly, columns give way at a price of 0.3 KL: POT takes a price for each side.
    reference = ot.unbalanced.sinkhorn_unbalanced(
        np.full(20, 1 / 20),
        np.full(5, 0.2),
        cost.double().numpy(),
        0.05,
        (math.inf, 0.3),
        reg_type="kl",
        numItermax=20000,
    )
    np.testing.assert_allclose(plan.mean(0).numpy(), reference.sum(0), atol=2e-3)
    assert float(plan[:, 0].mean()) < 0.15


def test_targets_follow_the_students_classes_or_the_teachers() -> None:
    for reweight, expected in ((True, [0.9, 0.1]), (False, [0.5, 0.5])):
        potentials = make([1.0, 0.5, 0.5], [0, 1, 1], reweight=reweight)
        torch.testing.assert_close(potentials.target(), torch.tensor([0.5, 0.25, 0.25]))
        counts = torch.tensor([0.0, 0.0, 0.0, 900.0, 100.0])
        potentials.observe(counts)
        marginal = torch.zeros(2).index_add_(0, torch.tensor([0, 1, 1]), potentials.target())
        torch.testing.assert_close(marginal, torch.tensor(expected), atol=1e-3, rtol=0)


def test_a_class_that_the_memory_lacks_has_no_part_in_the_marginal() -> None:
    potentials = Potentials(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([10, 0]), rate=0.1)
    potentials.observe(torch.tensor([0.0, 5.0, 95.0]))
    torch.testing.assert_close(potentials.class_marginal(), torch.tensor([1.0, 0.0]))


def test_a_class_long_out_of_sight_has_no_part_in_the_marginal_error() -> None:
    potentials = make([0.5, 0.5, 1.0], [0, 0, 1])
    potentials.observe(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))
    for _ in range(12_000):
        potentials.observe(torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]))
    error = float(potentials.marginal_error(within_classes=True))
    assert error == pytest.approx(0.0, abs=1e-4)


@pytest.mark.multirank
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_agree_with_one_process(launch: Launch, processes: int) -> None:
    alone = launch(SCRIPT).stdout.split()
    together = launch(SCRIPT, processes=processes).stdout.split()
    assert len(together) == processes
    for printed in together:
        ours = torch.tensor([float(x) for x in printed.split(",")])
        reference = torch.tensor([float(x) for x in alone[0].split(",")])
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)
