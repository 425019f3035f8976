"""Paired comparison of two rows: what of a difference is more than chance.

Both look at the same test clips, seed by seed. The interval resamples seeds and, within each,
clips (hierarchical bootstrap), so it holds what another seed would change as far as few seeds
show it: with three of them it is too narrow rather than too wide. The p-value turns the sign of
each clip's difference at random (paired sign flips within seeds): it takes the trained models as
they are, and says whether they differ on more clips like these, not whether others would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.errors import UsageError

Correct = Mapping[int, NDArray[np.bool_]]
"""Seed -> [N] whether each test clip was recognised, in the order of the split."""
Differences = list[NDArray[np.float64]]
"""For each seed [N]: -1, 0 or 1."""

DRAWS = 10_000


def compare(row: Correct, reference: Correct) -> dict[str, Any]:
    """How much more accurate ``row`` is than ``reference``, over the seeds that both have.

    Returns:
        ``difference`` with its 95 % interval ``low`` to ``high``, as parts of 1; ``p``; the
        difference of each seed.

    Raises:
        UsageError: they have no seed in common, or not the same clips.
    """
    seeds = sorted(set(row) & set(reference))
    if not seeds or any(len(row[seed]) != len(reference[seed]) for seed in seeds):
        raise UsageError(
            "Rows are compared clip by clip, and these have no seed or not the same test clips in "
            "common: run both with equal --seeds, into one --out."
        )
    parts = [row[seed].astype(float) - reference[seed].astype(float) for seed in seeds]
    means = bootstrap(parts, np.random.default_rng(0))
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "difference": float(np.mean([part.mean() for part in parts])),
        "low": float(low),
        "high": float(high),
        "p": sign_flip(parts, np.random.default_rng(0)),
        "differences": {seed: float(part.mean()) for seed, part in zip(seeds, parts, strict=True)},
    }


def bootstrap(parts: Differences, rng: np.random.Generator) -> NDArray[np.float64]:
    """[DRAWS] means over seeds and clips, both drawn with replacement."""
    drawn = np.empty((len(parts), len(parts), DRAWS))
    for number, part in enumerate(parts):
        # How many clips of each difference a resample holds is all that its mean depends on.
        shares = [float((part == value).mean()) for value in (-1.0, 0.0, 1.0)]
        counts = rng.multinomial(len(part), shares, size=(len(parts), DRAWS))
        drawn[:, number] = (counts[..., 2] - counts[..., 0]) / len(part)
    chosen = rng.integers(len(parts), size=(len(parts), DRAWS))
    places = np.arange(len(parts))[:, None]
    means: NDArray[np.float64] = drawn[places, chosen, np.arange(DRAWS)].mean(0)
    return means


def sign_flip(parts: Differences, rng: np.random.Generator) -> float:
    """Two-sided p-value of the mean over seeds of the clips' mean differences."""
    seen = abs(sum(part.mean() for part in parts))
    flipped = np.zeros(DRAWS)
    for part in parts:
        # A clip on which both agree has no sign; the others turn like coins.
        turning = int(np.count_nonzero(part))
        flipped += (2.0 * rng.binomial(turning, 0.5, size=DRAWS) - turning) / len(part)
    return float((1 + np.count_nonzero(np.abs(flipped) >= seen - 1e-12)) / (1 + DRAWS))
