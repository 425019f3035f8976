from __future__ import annotations

import math
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from cmkd_scale.losses.global_transport import (
    Assignment,
    against_all,
    against_candidates,
    against_own,
    block_products,
    block_sums,
    class_masked,
    with_gradient,
)

BATCH, CLASSES, WIDEST, DIM, SCALE = 10, 4, 5, 6, 3.0
SIZES = (5, 2, 3, 1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem() -> dict[str, Tensor]:
    """Blocks of unequal sizes, filled up at mass zero, and a batch with its labels."""
    valid = torch.arange(WIDEST) < torch.tensor(SIZES).unsqueeze(1)
    mass = torch.rand(CLASSES, WIDEST, generator=torch.Generator().manual_seed(1)) * valid
    return {
        "features": normal(BATCH, DIM, seed=2),
        "labels": torch.arange(BATCH) % CLASSES,
        "blocks": normal(CLASSES, WIDEST, DIM, seed=3),
        "log_mass": (mass / mass.sum(1, keepdim=True)).log(),
        "potentials": 0.2 * normal(CLASSES, WIDEST, seed=4),
    }


def masked(p: dict[str, Tensor], features: Tensor, epsilon: float, squared: bool) -> Assignment:
    labels = p["labels"]
    return class_masked(
        features,
        labels,
        blocks=p["blocks"],
        square_norms=p["blocks"].square().sum(2),
        log_mass=p["log_mass"][labels],
        potentials=p["potentials"][labels],
        scale=SCALE,
        epsilon=epsilon,
        squared=squared,
    )


def semi_dual(
    x: Tensor, prototypes: Tensor, log_mass: Tensor, v: Tensor, epsilon: float, squared: bool
) -> tuple[Tensor, Tensor]:
    """In float64: the objective whose derivative the envelope gradient is, and the plan."""
    apart = (x.unsqueeze(1) - prototypes).norm(dim=2)
    cost = (apart / SCALE) ** 2 if squared else apart / SCALE
    scores = (v - cost) / epsilon + log_mass
    return -epsilon * torch.logsumexp(scores, 1), torch.softmax(scores, 1) * cost


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.02])
def test_class_masked_value_and_gradient_against_float64_autograd(
    epsilon: float, squared: bool
) -> None:
    p = problem()
    ours = p["features"].clone().requires_grad_()
    assignment = masked(p, ours, epsilon, squared)
    assignment.cost.sum().backward()
    exact = p["features"].double().requires_grad_()
    labels = p["labels"]
    objective, transported = semi_dual(
        exact,
        p["blocks"][labels].double(),
        p["log_mass"][labels].double(),
        p["potentials"][labels].double(),
        epsilon,
        squared,
    )
    objective.sum().backward()
    torch.testing.assert_close(assignment.cost.double(), transported.sum(1), rtol=1e-5, atol=1e-6)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)
    padding = ~torch.isfinite(p["log_mass"])[labels]
    assert float(assignment.plan[padding].abs().max()) == 0.0


@pytest.mark.parametrize("squared", [False, True])
def test_all_and_candidates_agree_with_float64(squared: bool) -> None:
    prototypes, x = normal(12, DIM, seed=5), normal(BATCH, DIM, seed=6)
    log_mass = torch.softmax(normal(12, seed=7), 0).log()
    v, label_cost = 0.1 * normal(12, seed=8), normal(BATCH, 12, seed=9).abs()
    exact = x.double().requires_grad_()
    objective, transported = semi_dual(
        exact,
        prototypes.double().expand(BATCH, -1, -1),
        log_mass.double(),
        v.double(),
        0.05,
        squared,
    )
    objective.sum().backward()
    everything = torch.arange(12).expand(BATCH, -1)
    arguments: dict[str, Any] = {"scale": SCALE, "epsilon": 0.05, "squared": squared}
    for kind in ("all", "candidates"):
        ours = x.clone().requires_grad_()
        if kind == "all":
            found = against_all(
                ours,
                prototypes=prototypes,
                square_norms=prototypes.square().sum(1),
                log_mass=log_mass,
                potentials=v,
                **arguments,
            )
        else:
            found = against_candidates(
                ours,
                candidates=prototypes[everything],
                log_mass=log_mass[everything],
                potentials=v[everything],
                **arguments,
            )
        found.cost.sum().backward()
        torch.testing.assert_close(found.cost.double(), transported.sum(1), rtol=1e-5, atol=1e-6)
        assert ours.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)
    priced = against_all(
        x,
        prototypes=prototypes,
        square_norms=prototypes.square().sum(1),
        log_mass=log_mass,
        potentials=v,
        label_cost=label_cost,
        **arguments,
    )
    distance = torch.cdist(x, prototypes).double() / SCALE
    cost = (distance**2 if squared else distance) + label_cost
    expected = torch.softmax((v - cost) / 0.05 + log_mass, 1)
    torch.testing.assert_close(priced.plan.double(), expected, rtol=1e-3, atol=1e-6)


def test_a_converged_class_masked_problem_is_exact_transport() -> None:
    """Potentials found in float64 by POT; our value must be the cost of its exact plan."""
    x, prototypes = normal(40, DIM, seed=10), normal(5, DIM, seed=11)
    mass = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    cost = torch.cdist(x.double(), prototypes.double()).numpy() / SCALE
    exact, log = ot.emd2(np.full(40, 1 / 40), mass, cost, log=True)
    labels = torch.zeros(40, dtype=torch.int64)
    blocks = prototypes.unsqueeze(0)
    v = torch.from_numpy(log["v"]).float().expand(40, -1)
    assignment = class_masked(
        x,
        labels,
        blocks=blocks,
        square_norms=blocks.square().sum(2),
        log_mass=torch.from_numpy(mass).float().log().expand(40, -1),
        potentials=v,
        scale=SCALE,
        epsilon=1e-4,
    )
    assert float(assignment.cost.mean()) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_of_226_epsilons_stay_finite(dtype: torch.dtype) -> None:
    p = problem()
    far = (200.0 * p["features"]).to(dtype)
    features = far.clone().requires_grad_()
    epsilon = float(torch.cdist(far.float(), p["blocks"].flatten(0, 1)).max()) / SCALE / 226
    assignment = masked(p, features, epsilon, squared=False)
    assignment.cost.sum().backward()
    assert torch.isfinite(assignment.cost).all()
    assert assignment.cost.dtype == torch.float32
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    torch.testing.assert_close(assignment.plan.sum(1), torch.ones(BATCH))


def test_a_sample_at_a_prototype_has_a_finite_gradient() -> None:
    p = problem()
    labels = p["labels"]
    features = p["blocks"][labels, 0].clone().requires_grad_()
    assignment = masked(p, features, 0.02, squared=False)
    assignment.cost.sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert float(assignment.cost[3].detach()) == pytest.approx(0.0, abs=1e-3)  # its only prototype


def test_blocks_are_read_as_gathered() -> None:
    blocks, labels = normal(7, 9, 5, seed=12), torch.tensor([3, 3, 0, 6])
    x, weights = normal(4, 5, seed=13), normal(4, 9, seed=14)
    products = torch.einsum("bkd,bd->bk", blocks[labels].double(), x.double()).float()
    torch.testing.assert_close(block_products(blocks, labels, x), products)
    sums = torch.einsum("bk,bkd->bd", weights.double(), blocks[labels].double()).float()
    torch.testing.assert_close(block_sums(weights, blocks, labels), sums)


def test_a_known_gradient_is_scaled_by_what_follows() -> None:
    x = normal(3, 2, seed=15).requires_grad_()
    gradient = normal(3, 2, seed=16)
    (with_gradient(x, torch.ones(3), gradient) * torch.tensor([2.0, 0.0, -1.0])).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, gradient * torch.tensor([[2.0], [0.0], [-1.0]]))


def test_the_self_term_is_half_of_transport_to_recent_features_of_the_class() -> None:
    x, recent = normal(6, DIM, seed=17).requires_grad_(), normal(9, DIM, seed=18)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    recent_labels = torch.tensor([0] * 5 + [1] * 4)
    value = against_own(
        x, labels, recent=recent, recent_labels=recent_labels, scale=SCALE, epsilon=0.01
    )
    assert float(value[5].detach()) == 0.0, "a class without recent features is left out"
    for label, rows in ((0, slice(0, 3)), (1, slice(3, 5))):
        mine = recent[recent_labels == label]
        cost = torch.cdist(x.detach()[rows], mine).double().numpy() / SCALE
        n, m = cost.shape
        exact = ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), cost)
        assert float(value[rows].detach().mean()) == pytest.approx(exact / 2, rel=0.03)
    value.sum().backward()
    assert x.grad is not None
    assert float(x.grad[5].abs().sum()) == 0.0
    assert float(x.grad[:5].abs().sum(1).min()) > 0.0
    assert math.isfinite(float(x.grad.sum()))
