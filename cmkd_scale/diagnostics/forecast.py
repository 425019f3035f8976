"""Will this teacher help? The expected gain in accuracy, before any training with the teacher.

A whole student gains from a teacher in proportion to what a linear head gains from it on the
features of a student that has not met it (``trial``). The factor and the interval are those of the
pairs of teacher and student task in docs/benchmarks.md (``tools/bench/forecast.py``), which range
over three modalities, 1 to 50 labels a class, and teachers without any shared structure.
"""

from __future__ import annotations

from dataclasses import dataclass

from cmkd_scale.diagnostics.trial import Trial

GAIN = 2.0
"""Points that the student gains for a point that the heads gain."""
SPREAD = 0.07
"""Half the width of the interval: 90 % of the pairs lie within it, each predicted from the
others."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expected gain over ``ce_ls`` of a student without a guard, in accuracy of 0 to 1."""

    gain: float
    low: float
    high: float


def forecast(trial: Trial) -> Forecast:
    """The gain to expect of a teacher."""
    gain = GAIN * trial.gain
    return Forecast(gain, gain - SPREAD, gain + SPREAD)
