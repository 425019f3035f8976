"""Transport of a batch to N points, in units of the products with the kernel that it needs.

    python tools/bench/transport.py [--quick] [--json FILE]

One process, one thread, float32, features of width 128, epsilon 0.02 of the mean distance. Every
solver is given the cost and makes exactly 50 iterations, none stops early: about what so small an
epsilon needs. The first row of a size is the limit: two matrix-vector products with the kernel an
iteration, and nothing else. A ratio is the median over rounds of a variant's time divided by the
first row's in the same round; ``two products again`` is A against A, the noise.

``ours`` ends with the plan, which is the gradient of the value by the cost. ``ours, features to
gradient`` starts and ends one matrix product earlier and later: distances, value, and gradient of
the features, which the matrix products of 128 features dominate. ``ours, 20 iterations`` is in
units of 20 pairs of products: making the kernel is the part that does not shrink with them.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import ot
import torch
from torch import Tensor

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.losses.sinkhorn import pairwise_distance, transport_loss
from cmkd_scale.losses.transport_solver import Transport, sinkhorn
from tools.bench._bench import Goal, Rows, finish, measure, parse, print_rows

DIM, EPSILON, ITERATIONS = 128, 0.02, 50
SIZES = [(64, 64), (256, 1000), (256, 10_000), (256, 100_000)]
GOAL = 1.5
PEERS_UP_TO = 10_000
"""Columns beyond which a peer in the log domain takes minutes, and autograd has one round."""


class Problem:
    """Two clouds of features, their distances in units of the mean, uniform masses."""

    def __init__(self, rows: int, columns: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, DIM, generator=generator)
        self.y = torch.randn(columns, DIM, generator=generator) + 0.3
        distance = pairwise_distance(self.x, self.y)
        self.scale = float(distance.mean())
        self.cost = distance / self.scale
        self.row_mass = torch.full((rows,), 1 / rows)
        self.column_mass = torch.full((columns,), 1 / columns)

    def products(self, iterations: int = ITERATIONS) -> Callable[[], None]:
        """The limit: the kernel's products, no scaling in between."""
        kernel = torch.exp((1.0 - self.cost) / EPSILON)
        transposed = kernel.t()

        def run() -> None:
            for _ in range(iterations):
                torch.mv(kernel, self.column_mass)
                torch.mv(transposed, self.row_mass)

        return run

    def solve(self, cost: Tensor | None = None, iterations: int = ITERATIONS) -> Transport:
        """Ours, with a tolerance that is never reached."""
        return sinkhorn(
            self.cost if cost is None else cost,
            self.row_mass,
            self.column_mass,
            epsilon=EPSILON,
            iterations=iterations,
            tolerance=-1.0,
        )

    def short(self) -> Transport:
        """Ours, 20 iterations."""
        return self.solve(iterations=20)

    def solve_features(self) -> Tensor:
        """Ours, from the features to their gradient."""
        x = self.x.clone().requires_grad_()
        cost = pairwise_distance(x, self.y) / self.scale
        loss = transport_loss(cost, self.solve(cost.detach()).plan)
        return torch.autograd.grad(loss, x)[0]

    def pot_autograd(self) -> Tensor:
        """POT's value, differentiated through its iterations, to the gradient of the cost."""
        cost = self.cost.clone().requires_grad_()
        value = ot.sinkhorn2(
            self.row_mass, self.column_mass, cost, EPSILON, numItermax=ITERATIONS, stopThr=0.0
        )
        return torch.autograd.grad(value, cost)[0]

    def pot_log(self) -> Tensor:
        """POT's plan in the log domain, without a gradient."""
        plan: Tensor = ot.sinkhorn(
            self.row_mass,
            self.column_mass,
            self.cost,
            EPSILON,
            method="sinkhorn_log",
            numItermax=ITERATIONS,
            stopThr=0.0,
            warn=False,
        )
        return plan

    def geomloss(self) -> Callable[[], Tensor] | None:
        """geomloss's loss and gradient of the features, about as many steps; None if absent."""
        if importlib.util.find_spec("geomloss") is None:
            return None
        samples_loss = importlib.import_module("geomloss").SamplesLoss
        # It anneals from the diameter: the ratio of its steps makes about as many of them.
        diameter = 2.0 * float(self.cost.max()) * self.scale
        blur = EPSILON * self.scale
        loss = samples_loss(
            "sinkhorn",
            p=1,
            blur=blur,
            diameter=diameter,
            scaling=(blur / diameter) ** (1 / ITERATIONS),
            debias=False,
            backend="tensorized",
        )

        def run() -> Tensor:
            x = self.x.clone().requires_grad_()
            value = loss(self.row_mass, x, self.column_mass, self.y)
            return torch.autograd.grad(value, x)[0]

        return run


def measure_size(rows: int, columns: int, quick: bool) -> Rows:
    """All variants at one size."""
    problem = Problem(rows, columns)
    large = columns > PEERS_UP_TO
    limit = {"two products": problem.products()}
    variants: dict[str, Callable[[], object]] = {
        **limit,
        "two products again": problem.products(),
        "ours": problem.solve,
        "ours, features to gradient": problem.solve_features,
    }
    peers: dict[str, Callable[[], object]] = {"POT sinkhorn2, autograd": problem.pot_autograd}
    if not large:
        peers["POT sinkhorn_log"] = problem.pot_log
        if (geomloss := problem.geomloss()) is not None:
            peers["geomloss, features to gradient"] = geomloss
    rounds = 5 if quick or large else 15
    rows_by_name = measure(variants, rounds)
    short = {"20 products": problem.products(20), "ours, 20 iterations": problem.short}
    rows_by_name |= tail(measure(short, rounds))
    # Apart, because they leave nothing of ours in the cache; a peer may take many seconds.
    return rows_by_name | tail(measure({**limit, **peers}, 1 if large else 5))


def tail(rows: Rows) -> Rows:
    """All but the first variant, which the others are in units of."""
    return dict(list(rows.items())[1:])


def float64_value(cost: Tensor, epsilon: float) -> Tensor:
    """The regularised value at uniform masses, by log-domain iterations that autograd unrolls."""
    rows, columns = cost.shape
    second = cost.new_zeros(columns)
    for _ in range(1000):
        scores = (second - cost) / epsilon - math.log(columns)
        first = -epsilon * torch.logsumexp(scores, 1)
        scores = (first[:, None] - cost) / epsilon - math.log(rows)
        second = -epsilon * torch.logsumexp(scores, 0)
    return first.mean() + second.mean()


def gradient_error() -> float:
    """Relative error of our gradient of the features to float64's, at 64 x 64."""
    problem = Problem(64, 64)
    x = problem.x.double().requires_grad_()
    value = float64_value(torch.cdist(x, problem.y.double()) / problem.scale, EPSILON)
    expected = torch.autograd.grad(value, x)[0]
    ours = problem.solve_features().double()
    return float((ours - expected).norm() / expected.norm())


def entries_not_finite() -> float:
    """Of plan and potentials, at costs up to 226 epsilons, in float32 and bfloat16."""
    problem = Problem(256, 1000)
    spread = problem.cost - problem.cost.min()
    cost = spread * (226 * EPSILON / spread.max())
    solved = [problem.solve(cost.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]
    found = [value for one in solved for value in (one.plan, one.first, one.second)]
    return float(sum((~value.isfinite()).sum() for value in found))


def main() -> None:
    """Measure every size, then what must be right, and write it if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    if importlib.util.find_spec("geomloss") is None:
        print("geomloss: not installed")
    print(f"Peers other than POT's autograd: up to {PEERS_UP_TO:,} columns\n")
    tables, goals = {}, []
    for rows, columns in SIZES[:3] if options.quick else SIZES:
        name = f"{rows} x {columns:,}"
        tables[name] = measure_size(rows, columns, options.quick)
        print_rows(tables[name], title=name)
        print()
        if columns >= 1000:
            goals.append(
                Goal(f"ours at {name}, of the products", tables[name]["ours"]["ratio"], GOAL)
            )
    goals.append(Goal("entries that are not finite at cost/epsilon 226", entries_not_finite(), 0.0))
    goals.append(Goal("relative error of the gradient to float64", gradient_error(), 1e-3))
    finish(tables, goals, options.json, pot=ot.__version__)


if __name__ == "__main__":
    main()
