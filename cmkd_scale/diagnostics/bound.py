"""The error bound of a student, measured on held-out data: where each nat of its error comes from.

Tran et al. 2026 (arXiv 2606.10504) bound a student's risk by its teacher's, an alignment of
features and one of labels. Here the bound is an identity first. Let z be a student's feature in
the teacher's space, y its label, l_S the student's cross-entropy, p_T(. | z) what the frozen
teacher's head says, l_T = -log p_T(y | z) and kappa = p_T(y | z), so kappa l_T = phi(l_T) with
phi(l) = l e^-l. With S the student's samples, T the teacher's points and p_S the student's class
frequencies,

    A = sum_y p_S(y) E_{T|y}[kappa l_T]      what the teacher gets wrong
    B = E_S[l_S - kappa l_T]                 student's head against teacher's head
    D = E_S[kappa l_T] - A                   lost in transfer
    R_S = A + B + D.

Proof: B + D + A = E_S[l_S], every other term cancels, and so in every class for E_{S|y}. Each
of three distances between the sides of a class bounds D there, |D_y| <= U_y, and
|D| <= sum p_S |D_y| <= sum p_S U_y = U. For any coupling of S|y and T|y and any function f with
|f(a) - f(b)| <= L d(a, b), |E_S f - E_T f| <= L E d; the best coupling has E d = W1.

- U3: W1 of l_T on the line. phi'(l) = (1 - l) e^-l lies between -e^-2 and 1 for l >= 0: phi is
  1-Lipschitz. So is l itself: the same U3 bounds D with kappa = 1.
- U2: c* W1 of the margins m_j = s_y - s_j (j other than y) in the sup norm. l_T = log(1 +
  sum_j e^-m_j) has the derivative -p_j by m_j, whose absolute values add up to 1 - kappa. Those of
  kappa l_T add up to |1 - l| e^-l (1 - e^-l) = |1 + log kappa| kappa (1 - kappa), at most
  c* = 0.13541 (where kappa = 0.7147): kappa l_T is c*-Lipschitz in the sup norm.
- U1: c* max_j ||w_y - w_j|| W1 of the features. m_j(z) - m_j(t) = (w_y - w_j) . (z - t), so margins
  of a coupled pair differ by at most max_j ||w_y - w_j|| ||z - t||; U2 <= U1 if both are exact.

Neither of U2 and U3 is below the other by construction: U3 has no c*, and is far from tight where
the teacher's head is surely wrong of many samples and phi is flat. All distances are exact
(``bound_transport``) but where a class is too large for its share of the work that is allowed:
there U1 and U2 take the cost of a coupling that is not the best, which is larger, so still a bound.

kappa l_T is at most 1 / e and goes to 0 for samples that the teacher's head is confidently wrong
of: then B takes it all. Hence the plain cross-entropy of that head is printed beside, and the same
identity with kappa = 1. Departure from the paper: it states the bound for expectations; here T is
discrete (see ``BoundInputs``), and the teacher's term is weighted by the student's classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cmkd_scale.diagnostics.arrays import Floats
from cmkd_scale.diagnostics.bound_classes import class_table
from cmkd_scale.diagnostics.bound_inputs import BoundInputs, bound_inputs, sides_of
from cmkd_scale.diagnostics.bound_statistics import (
    Measured,
    intervals,
    noise_floor,
    permutation_null,
)
from cmkd_scale.memory.bank import PrototypeMemory

__all__ = ["BoundInputs", "bound_inputs", "bound_report", "memory_bound"]

_TERMS = ("risk", "teacher_term", "label_gap", "transfer_gap", "teacher_cross_entropy")


def bound_report(
    inputs: BoundInputs, *, seed: int = 0, draws: int = 1000, permutations: int = 200
) -> dict[str, Any]:
    """Measure the terms of the bound, what bounds the transfer gap, and how far to trust them.

    Classes that the teacher lacks are left out, and the student's class frequencies are those
    among the others; without any other there is nothing but ``samples: 0``. In nats; a term is
    ``{"value", "low", "high"}`` with its 95 % interval (``bound_statistics.intervals``).

    Args:
        inputs: held-out samples and the teacher's side.
        seed: of draws, permutations and halves.
        draws: of the bootstrap.
        permutations: of the teacher's classes.

    Returns:
        Plain values: the terms ``risk`` (R_S), ``teacher_term`` (A), ``label_gap`` (B),
        ``transfer_gap`` (D), ``teacher_cross_entropy`` (E_S[l_T]); ``without_kappa``: A, B and D
        with kappa = 1; ``bounds`` on |D|: U1, U2 (``exact_classes``: in how many the distance is
        exact) and U3; ``tightness``: |D| as a share of each, 1 where both are 0; ``null`` and
        ``noise_floor`` as in ``bound_statistics``; ``wrong_class_mass``: share of samples whose
        nearest prototype is of another class; ``teacher_risk_held_out``: of the teacher's own
        held-out samples, None if unknown; ``per_class``, by class number; counts.

    Raises:
        ValueError: a label is none of the C classes, or there are no draws or permutations.
    """
    if draws < 1 or permutations < 1:
        raise ValueError(f"{draws} draws and {permutations} permutations; both must be 1 or more")
    sides = sides_of(inputs)
    measured = sides.measured
    if not len(measured.labels):
        return {"samples": 0, "classes": 0, "classes_left_out": sides.left_out}
    share, spread = measured.share, intervals(measured, seed, draws)
    table, exact = class_table(sides)
    totals = {name: float(share @ column) for name, column in table.items()}
    terms = {name: _with_interval(totals[name], spread[name]) for name in _TERMS}
    bounds: dict[str, dict[str, float]] = {
        name: {"value": totals[name], "exact_classes": exact[name]} for name in ("U1", "U2")
    }
    bounds["U3"] = _with_interval(totals["U3"], spread["U3"])
    gap = abs(totals["transfer_gap"])
    return {
        "samples": len(measured.labels),
        "samples_left_out": len(inputs.labels) - len(measured.labels),
        "classes": int(np.sum(share > 0)),
        "classes_left_out": sides.left_out,
        "teacher_side": "samples" if measured.teacher_is_sampled else "prototypes",
        **terms,
        "without_kappa": _without_kappa(measured, totals),
        "bounds": bounds,
        "tightness": {k: gap / b["value"] if b["value"] else 1.0 for k, b in bounds.items()},
        "null": permutation_null(measured, seed, permutations),
        "noise_floor": noise_floor(measured, seed),
        "wrong_class_mass": totals["wrong_class_mass"],
        "teacher_risk_held_out": _held_out_risk(inputs.class_risk, share),
        "per_class": _rows(measured, table),
    }


def memory_bound(
    memory: PrototypeMemory, features: Tensor, logits: Tensor, labels: Tensor
) -> dict[str, Any]:
    """``bound_report`` of a student beside a memory in its classes, the table by class name.

    Args:
        memory: of the teacher, as ``align_to_student`` makes it.
        features: [N, D] in the memory's space.
        logits: [N, C] of the student's own head.
        labels: [N] int64
    """
    report = bound_report(bound_inputs(memory, features, logits, labels))
    rows = report.get("per_class", {}).items()
    return {**report, "per_class": {memory.class_names[int(label)]: row for label, row in rows}}


def _with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    return {"value": value, "low": interval[0], "high": interval[1]}


def _without_kappa(measured: Measured, totals: dict[str, float]) -> dict[str, float]:
    """A, B and D with kappa = 1."""
    term, crossed = float(measured.teacher_weight @ measured.teacher), "teacher_cross_entropy"
    return {
        "teacher_term": term,
        "label_gap": totals["risk"] - totals[crossed],
        "transfer_gap": totals[crossed] - term,
    }


def _held_out_risk(class_risk: Tensor | None, share: Floats) -> float | None:
    """Mean over the classes of which there is a risk, by the student's frequencies."""
    if class_risk is None:
        return None
    risk = class_risk.double().cpu().numpy()
    weight = np.where(np.isnan(risk), 0.0, share)
    return float(weight @ np.nan_to_num(risk) / weight.sum()) if weight.sum() else None


def _rows(measured: Measured, table: dict[str, Floats]) -> dict[str, dict[str, float]]:
    """The table by class number, of classes with samples."""
    counts = np.bincount(measured.labels, minlength=len(measured.share))
    return {
        str(label): {
            "samples": int(counts[label]),
            **{name: float(column[label]) for name, column in table.items()},
        }
        for label in np.flatnonzero(counts)
    }
