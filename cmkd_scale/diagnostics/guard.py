"""The guard: how far a teacher is trusted, so that one with a wrong structure does no harm.

What transfers between modalities is class structure, and a teacher whose structure is not the
student's costs accuracy (docs/benchmarks.md). While a student learns from a teacher, it takes that
structure over, right or wrong, and no loss on its few training samples tells: a memory with
permuted classes is as consistent with itself as the right one. So the guard asks a student that
has not met the teacher: one trained for a few steps on labels alone. Where its structure agrees
with the teacher's by far more than with a randomly named one, the teacher has all its weight;
where it does not, none, and training is the control ``ce_ls``. A teacher whose structure agrees and
that is weak all the same is trusted, and may cost some points (docs/benchmarks.md).
"""

from __future__ import annotations

from cmkd_scale.diagnostics.structure import Agreement

NO_TRUST_Z = 2.0
"""Agreement in standard deviations of the null up to which a teacher is not trusted at all; by
chance, one in 44 is above."""
FULL_TRUST_Z = 4.0
"""From here on it is trusted fully; between, in proportion."""


def trust(agreement: Agreement | None) -> float:
    """Weight of a teacher's terms, 0 to 1.

    Args:
        agreement: of the plainly trained student's class structure with the teacher's; None
            where there are too few classes to tell, and then nothing speaks for the teacher.
    """
    if agreement is None:
        return 0.0
    return min(1.0, max(0.0, (agreement.z - NO_TRUST_Z) / (FULL_TRUST_Z - NO_TRUST_Z)))
