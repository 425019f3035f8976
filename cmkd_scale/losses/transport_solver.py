"""Entropic optimal transport between a batch and a set of points, finite in float32.

Sinkhorn's scaling iterations on a stabilised kernel: Schmitzer, "Stabilized sparse scaling
algorithms for entropy regularized transport problems" (2019), algorithm 2; unbalanced, Chizat
et al., "Scaling algorithms for unbalanced optimal transport problems" (2018), section 4. The
exponential is taken when the potentials have moved far, not in every iteration, so that an
iteration costs two matrix-vector products. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cmkd_scale.errors import UsageError

_CHECK_EVERY = 10
_FARTHEST = 1e9
"""Scaling, or its reciprocal, that is absorbed: products of two stay within float32."""
_TINY = 1e-37
"""Added to every sum of the kernel, so that its reciprocal is finite."""


@dataclass(frozen=True, slots=True)
class Transport:
    """A solved problem: ``plan_ij = a_i b_j exp((first_i + second_j - cost_ij) / epsilon)``.

    With equal totals of 1 and ``rho=inf``, ``a . first + b . second`` is the dual value:
    ``<plan, cost> + epsilon KL(plan | a x b)`` at convergence.
    """

    plan: Tensor
    """[B, N] mass sent from each row to each column; its rows sum to ``row_mass``."""
    first: Tensor
    """[B] dual potentials of the rows, in units of the cost."""
    second: Tensor
    """[N] dual potentials of the columns, in units of the cost; 0 for a column without mass."""
    marginal_error: Tensor
    """[] L1 distance of the plan's column sums to what they should be, in units of mass."""


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    row_mass: Tensor,
    column_mass: Tensor,
    *,
    epsilon: float,
    iterations: int = 100,
    tolerance: float = 1e-4,
    rho: float = math.inf,
    start_epsilon: float | None = None,
) -> Transport:
    """Minimise ``<P, c> + epsilon KL(P | a x b) + rho KL(P^T 1 | b)`` over plans with ``P 1 = a``.

    Rows are held to their mass exactly: every sample is sent somewhere. Only columns may give
    way, and only with a finite ``rho``; ``rho=inf`` is the balanced problem, which needs equal
    totals. Computed in float32 whatever the inputs' type.

    A pair that may not be matched has a cost of +inf. A row that reaches no column with mass
    sends nothing, and ``marginal_error`` says so; so does it where parts that are cut off from
    each other have unequal masses.

    Args:
        cost: [B, N] cost of each pair.
        row_mass: [B] masses a, zeros allowed.
        column_mass: [N] masses b, zeros allowed.
        epsilon: entropic regularisation, in units of the cost.
        iterations: most iterations at each epsilon. Two products with the kernel in each.
        tolerance: ends the iterations at a marginal error of this, looked at in every tenth.
        rho: weight of the columns' marginals, in units of the cost.
        start_epsilon: solve first near this epsilon and halve it down to ``epsilon`` (epsilon
            scaling, Schmitzer, section 3.2); helps where the cost is hundreds of epsilons.

    Raises:
        UsageError: shapes do not fit, epsilon, rho or iterations are not positive, or totals
            differ in a balanced problem.
    """
    _check(cost, row_mass, column_mass, epsilon, rho, iterations)
    # On a GPU autocast takes these products to 16 bits, which are wrong in the third digit.
    with torch.autocast(cost.device.type, enabled=False):
        solver = _Solver(cost.float(), row_mass.float(), column_mass.float(), rho)
        halvings = 0
        if start_epsilon is not None and start_epsilon > epsilon:
            halvings = math.ceil(math.log2(start_epsilon / epsilon) - 1e-9)
        for power in range(halvings, -1, -1):
            solver.solve(epsilon * 2.0**power, iterations, tolerance)
        return solver.transport()


def _check(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, rho: float, iterations: int) -> None:
    if cost.ndim != 2 or a.shape != cost.shape[:1] or b.shape != cost.shape[1:] or not cost.numel():
        raise UsageError(
            f"Transport needs a cost [B, N] with masses [B] and [N], none of them empty, and got "
            f"{list(cost.shape)}, {list(a.shape)} and {list(b.shape)}: pass one mass a row and one "
            "a column."
        )
    if not (epsilon > 0 and rho > 0 and iterations > 0):
        raise UsageError(
            "Transport needs a positive epsilon, rho and number of iterations, and got "
            f"{epsilon}, {rho} and {iterations}: take for example epsilon=0.02 of the mean cost, "
            "rho=inf and 100 iterations."
        )
    total, other = float(a.float().sum()), float(b.float().sum())
    # bfloat16 masses do not add up to better than this.
    if math.isinf(rho) and not abs(total - other) <= 1e-2 * max(total, other):
        raise UsageError(
            f"Balanced transport needs equal totals, and the rows have {total:.6g}, the columns "
            f"{other:.6g}: normalise both to 1, or give a finite rho."
        )


class _Solver:
    """The state of the iterations: potentials, stabilised kernel and scalings.

    ``kernel_ij = 2^(gamma_j - cost_ij / bit - offset_i)`` with entries in [0, 1], where a bit is
    ``epsilon log 2``: ``exp2`` takes a third of the time of ``exp`` on a CPU, and a tenth where
    results are subnormal. gamma is what is absorbed of the columns' potential, in bits; the rest
    is in ``column``, the columns' scaling v times their mass.
    """

    column: Tensor
    error: Tensor

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, rho: float) -> None:
        self.cost, self.a, self.b, self.rho = cost, a, b, rho
        self.kernel = torch.empty_like(cost, memory_format=torch.contiguous_format)
        self.kernel_t = self.kernel.t()
        self.present = b > 0
        self.absent = (b == 0).float()
        self.divisor = b + self.absent
        self.row_floor = torch.full_like(a, _TINY)
        self.column_floor = torch.full_like(b, _TINY)
        self.second = torch.zeros_like(b)

    def solve(self, epsilon: float, iterations: int, tolerance: float) -> None:
        """Iterate at one epsilon, from the potentials of the epsilon before."""
        self.bit = epsilon * math.log(2.0)
        self.power = self.rho / (self.rho + epsilon) if math.isfinite(self.rho) else 1.0
        self.gamma = torch.where(self.present, self.second / self.bit, -math.inf)
        self._absorb()
        # Locals, because at N = 1000 what surrounds the two products is a tenth of their time.
        a, b, kernel, kernel_t = self.a, self.b, self.kernel, self.kernel_t
        row_floor, column_floor = self.row_floor, self.column_floor
        for iteration in range(1, iterations + 1):
            row_sum = torch.addmv(row_floor, kernel, self.column)
            column_sum = torch.addmv(column_floor, kernel_t, a / row_sum)
            column = b / column_sum if self.power == 1.0 else self._proximal(column_sum)
            if iteration % _CHECK_EVERY == 0 or iteration == iterations:
                self.error = (column_sum * (column - self.column)).abs().sum()
                # The last update of the columns is not taken: rows hold exactly in the plan.
                if iteration == iterations or float(self.error) <= tolerance:
                    break
            self.column = column
            if iteration % _CHECK_EVERY == 0 or iteration == 1:
                self._absorb_if_far(iteration)
        self.row_sum = row_sum
        potential = self.gamma + self._scaling().log2()
        self.second = torch.where(self.present, self.bit * potential, 0.0)

    def transport(self) -> Transport:
        """The plan, which takes the kernel's storage, and the potentials."""
        first = -self.bit * (self.offset + self.row_sum.log2())
        self.kernel.mul_((self.a / self.row_sum)[:, None]).mul_(self.column)
        return Transport(self.kernel, first, self.second, self.error)

    def _absorb(self) -> None:
        """Take the exponential anew, with every row's largest entry at 1, and v = 1."""
        self._fill()
        self.kernel.exp2_()
        self.column = self.b
        if self.power != 1.0:
            self.damping = torch.where(self.present, (1.0 - self.power) * self.gamma, 0.0)

    def _absorb_if_far(self, iteration: int) -> None:
        scaling = self._scaling()
        low, high = torch.aminmax(scaling)
        if float(low) > 1 / _FARTHEST and float(high) < _FARTHEST:
            return
        if iteration == 1:
            # A column may be so far from every row that its sum has underflown: bring all near.
            self._fill()
            farthest = self.kernel.amax(0)
            self.gamma -= torch.where(farthest.isfinite(), farthest, 0.0)
        else:
            self.gamma += scaling.log2()
        self._absorb()

    def _fill(self) -> None:
        """The kernel's exponents."""
        torch.sub(self.gamma, self.cost, alpha=1 / self.bit, out=self.kernel)
        # A row that reaches nothing has only -inf, from which -inf cannot be taken.
        self.offset = self.kernel.amax(1).clamp(min=torch.finfo(torch.float32).min)
        self.kernel.sub_(self.offset[:, None])

    def _scaling(self) -> Tensor:
        """The columns' scaling v; 1 where there is no mass."""
        return torch.addcdiv(self.absent, self.column, self.divisor).clamp_(min=_TINY)

    def _proximal(self, column_sum: Tensor) -> Tensor:
        """Mass times ``v = s^(-rho / (rho + epsilon)) 2^(-damping)``, of an unbalanced problem."""
        log_scaling = column_sum.log2() * -self.power - self.damping
        return log_scaling.clamp(-120.0, 120.0).exp2_().mul_(self.b)
