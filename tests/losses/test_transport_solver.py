from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cmkd_scale.errors import UsageError
from cmkd_scale.losses.sinkhorn import transport_loss
from cmkd_scale.losses.transport_solver import sinkhorn


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Distances of two clouds in the plane over their mean, and uneven masses."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    y = torch.randn(columns, 2, generator=generator) * 1.5 + 1.0
    cost = torch.cdist(x, y)
    row_mass = torch.softmax(torch.randn(rows, generator=generator), 0)
    column_mass = torch.softmax(torch.randn(columns, generator=generator), 0)
    return cost / cost.mean(), row_mass, column_mass


def double(mass: Tensor) -> npt.NDArray[np.float64]:
    """In float64, with a total that is 1 to float64's precision."""
    values = mass.double()
    return np.asarray((values / values.sum()).numpy())


def test_plan_and_potentials_agree_with_pot() -> None:
    cost, a, b = problem(20, 30)
    epsilon = 0.1
    solved = sinkhorn(cost, a, b, epsilon=epsilon, iterations=2000, tolerance=1e-6)
    reference = ot.sinkhorn(
        double(a),
        double(b),
        cost.double().numpy(),
        epsilon,
        method="sinkhorn_log",
        stopThr=1e-10,
        numItermax=5000,
    )
    np.testing.assert_allclose(solved.plan.double().numpy(), reference, atol=1e-6, rtol=2e-3)
    potentials = solved.first[:, None] + solved.second
    from_potentials = a[:, None] * b * torch.exp((potentials - cost) / epsilon)
    torch.testing.assert_close(from_potentials, solved.plan, rtol=1e-4, atol=1e-8)
    divergence = (reference * np.log(reference / np.outer(double(a), double(b)))).sum()
    expected = (reference * cost.double().numpy()).sum() + epsilon * divergence
    assert float(a @ solved.first + b @ solved.second) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_value_approaches_exact_transport_when_epsilon_is_annealed(seed: int) -> None:
    cost, a, b = problem(30, 50, seed)
    exact = ot.emd2(double(a), double(b), cost.double().numpy())
    solved = sinkhorn(cost, a, b, epsilon=0.004, iterations=300, start_epsilon=0.3)
    assert float(transport_loss(cost, solved.plan)) == pytest.approx(exact, rel=0.01)
    assert float(solved.marginal_error) < 5e-3


def test_annealing_epsilon_solves_what_as_many_iterations_at_the_end_do_not() -> None:
    cost, a, b = problem(30, 50)
    annealed = sinkhorn(cost, a, b, epsilon=0.001, iterations=100, start_epsilon=0.3)
    direct = sinkhorn(cost, a, b, epsilon=0.001, iterations=1000)
    assert float(cost.max()) / 0.001 > 3000
    assert float(annealed.marginal_error) < 0.02 < float(direct.marginal_error)


@pytest.mark.parametrize("rho", [0.05, 0.5, 20.0])
def test_unbalanced_columns_agree_with_pot(rho: float) -> None:
    cost, a, b = problem(20, 30)
    b = b * 2.0
    solved = sinkhorn(cost, a, b, epsilon=0.1, iterations=5000, tolerance=1e-6, rho=rho)
    reference = ot.unbalanced.sinkhorn_unbalanced(
        a.double().numpy(),
        b.double().numpy(),
        cost.double().numpy(),
        0.1,
        (math.inf, rho),
        reg_type="kl",
        numItermax=20_000,
        stopThr=1e-12,
    )
    np.testing.assert_allclose(solved.plan.double().numpy(), reference, atol=1e-6, rtol=2e-3)
    torch.testing.assert_close(solved.plan.sum(1), a)


def test_the_marginal_error_is_that_of_the_plan() -> None:
    cost, a, b = problem(20, 30)
    solved = sinkhorn(cost, a, b, epsilon=0.02, iterations=15)
    missing = (solved.plan.sum(0) - b).abs().sum()
    assert float(missing) > 1e-3
    torch.testing.assert_close(solved.marginal_error, missing, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(solved.plan.sum(1), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("start_epsilon", [None, 50.0])
@pytest.mark.parametrize("rho", [math.inf, 30.0])
def test_costs_of_226_epsilons_are_finite(
    dtype: torch.dtype, start_epsilon: float | None, rho: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    cost = 226.0 * torch.rand(8, 12, generator=generator)
    cost[:, 0] = 226.0
    cost[0] = 226.0
    solved = sinkhorn(
        cost.to(dtype),
        torch.full((8,), 1 / 8, dtype=dtype),
        torch.full((12,), 1 / 12, dtype=dtype),
        epsilon=1.0,
        iterations=2000,
        rho=rho,
        start_epsilon=start_epsilon,
    )
    for value in (solved.plan, solved.first, solved.second, solved.marginal_error):
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
    # bfloat16 cannot hold 1/12 to better than 0.4 %.
    assert float(solved.marginal_error) < (1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_points_far_from_all_others_still_receive_their_mass() -> None:
    cost, a, b = problem(10, 14)
    cost[:, 3] += 1e4
    cost[2] += 1e4
    solved = sinkhorn(cost, a, b, epsilon=0.1, iterations=500)
    assert float(solved.marginal_error) < 1e-3
    torch.testing.assert_close(solved.plan.sum(0), b, rtol=1e-2, atol=1e-5)


def test_masses_of_zero_are_left_out() -> None:
    cost, a, b = problem(10, 14)
    a[2], b[:5] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    # The nearest points of all are those without mass.
    cost[2], cost[:, 4] = 0.0, 0.0
    solved = sinkhorn(cost, a, b, epsilon=0.01, iterations=1000, tolerance=1e-6)
    kept = torch.arange(10) != 2
    alone = sinkhorn(
        cost[kept][:, 5:], a[kept], b[5:], epsilon=0.01, iterations=1000, tolerance=1e-6
    )
    assert float(solved.plan[2].sum() + solved.plan[:, :5].sum()) == 0.0
    torch.testing.assert_close(solved.plan[kept][:, 5:], alone.plan, rtol=1e-2, atol=1e-6)
    assert torch.isfinite(solved.first).all()
    assert torch.equal(solved.second[:5], torch.zeros(5))


def test_masked_pairs_split_the_problem_by_class() -> None:
    cost, a, b = problem(12, 18)
    row_class, column_class = torch.arange(12) % 3, torch.arange(18) % 3
    share = torch.zeros(3).index_add_(0, row_class, a)
    total = torch.zeros(3).index_add_(0, column_class, b)
    b = b * (share / total)[column_class]
    masked = cost.masked_fill(row_class[:, None] != column_class, math.inf).requires_grad_()
    solved = sinkhorn(masked, a, b, epsilon=0.05, iterations=2000, tolerance=1e-6)
    expected = torch.zeros(12, 18, dtype=torch.float64)
    for label in range(3):
        rows, columns = row_class == label, column_class == label
        alone = ot.sinkhorn(
            double(a[rows]),
            double(b[columns]),
            cost[rows][:, columns].double().numpy(),
            0.05,
            method="sinkhorn_log",
            stopThr=1e-10,
            numItermax=5000,
        )
        expected[rows[:, None] & columns] = share[label].double() * torch.from_numpy(alone.ravel())
    torch.testing.assert_close(solved.plan.double(), expected, rtol=2e-3, atol=1e-6)
    plan = solved.plan.clone().requires_grad_()
    value = transport_loss(masked, plan)
    value.backward()
    assert plan.grad is None
    torch.testing.assert_close(value.detach().double(), (expected * cost).sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(masked.grad, solved.plan)


def test_a_row_that_reaches_nothing_is_reported() -> None:
    cost, a, b = problem(6, 8)
    cost[1] = math.inf
    solved = sinkhorn(cost, a, b, epsilon=0.1)
    assert torch.isfinite(solved.plan).all()
    assert float(solved.plan[1].sum()) == 0.0
    assert float(solved.marginal_error) == pytest.approx(float(a[1]), rel=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    seed=st.integers(0, 1000),
    epsilon=st.floats(0.05, 1.0),
)
def test_plans_hold_their_marginals_and_follow_permutations(
    rows: int, columns: int, seed: int, epsilon: float
) -> None:
    cost, a, b = problem(rows, columns, seed)
    solved = sinkhorn(cost, a, b, epsilon=epsilon, iterations=3000, tolerance=1e-5)
    assert (solved.plan >= 0).all()
    torch.testing.assert_close(solved.plan.sum(1), a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(solved.plan.sum(0), b, rtol=0, atol=1e-4)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    permuted = sinkhorn(cost[order], a[order], b, epsilon=epsilon, iterations=3000, tolerance=1e-5)
    torch.testing.assert_close(permuted.plan, solved.plan[order], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shapes", "options", "says"),
    [
        (((3, 4), (4,), (4,)), {}, r"got \[3, 4\], \[4\] and \[4\]"),
        (((3,), (3,), (4,)), {}, "pass one mass a row"),
        (((3, 0), (3,), (0,)), {}, "none of them empty"),
        (((3, 4), (3,), (4,)), {"epsilon": 0.0}, "positive epsilon"),
        (((3, 4), (3,), (4,)), {"rho": -1.0}, "positive epsilon, rho"),
        (((3, 4), (3,), (4,)), {"iterations": 0}, "number of iterations"),
        (((3, 4), (3,), (4,)), {}, "rows have 3, the columns 4: normalise both"),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(
    shapes: tuple[tuple[int, ...], ...], options: dict[str, float], says: str
) -> None:
    cost, a, b = (torch.ones(shape) for shape in shapes)
    with pytest.raises(UsageError, match=says):
        sinkhorn(cost, a, b, **{"epsilon": 0.1, **options})  # type: ignore[arg-type]
