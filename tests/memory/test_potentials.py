from __future__ import annotations

import pytest
import torch

from cmkd_scale.losses.sinkhorn import semi_dual_plan
from cmkd_scale.memory.potentials import Potentials
from tests.conftest import REPOSITORY, Launch

SCRIPT = REPOSITORY / "tests" / "scripts" / "potentials.py"


def test_ascent_reaches_the_target_masses_of_every_class() -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.tensor([0.7, 0.3, 0.5, 0.25, 0.25])
    classes = torch.tensor([0, 0, 1, 1, 1])
    columns = torch.tensor([[0, 1, 0], [2, 3, 4]])
    log_mass = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.25, 0.25]]).log()
    prototypes = torch.randn(5, 2, generator=generator)
    # Nine times as many samples of class 0: masses are shares of a class, so this must not
    # send any mass across.
    labels = torch.tensor([0] * 90 + [1] * 10)
    features = torch.randn(100, 2, generator=generator)
    potentials = Potentials(mass, classes, classes=2, rate=0.05)
    known = torch.ones(100, dtype=torch.bool)
    errors = []
    for _ in range(2000):
        cost = (features.unsqueeze(1) - prototypes[columns[labels]]).norm(dim=2)
        plan = semi_dual_plan(
            cost, log_mass[labels], potentials.value[columns[labels]], epsilon=0.1
        )
        received = potentials.received(plan, columns[labels], labels, known)
        errors.append(float(potentials.update(received)))
    assert errors[-1] < 0.01 < errors[0]
    sent = received[:5] / received[5:][classes]
    torch.testing.assert_close(sent, mass, atol=0.01, rtol=0)


def test_absent_classes_and_unknown_samples_move_nothing() -> None:
    potentials = Potentials(torch.tensor([1.0, 0.5, 0.5]), torch.tensor([0, 1, 1]), 2, rate=1.0)
    plan = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    columns = torch.tensor([[0, 0], [1, 2]])
    labels = torch.tensor([0, 1])
    known = torch.tensor([True, False])
    potentials.update(potentials.received(plan, columns, labels, known))
    assert potentials.value.tolist() == [0.0, 0.0, 0.0]


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
