"""When a run has gone wrong: skip a step, then roll back, then stop."""

from __future__ import annotations

import math

from cmkd_scale.errors import CmkdError

_HORIZON = 100  # steps that the mean loss spans
_IN_A_ROW = 5  # steps with a loss far above it that count as an explosion


class DivergedError(CmkdError):
    """Training has diverged: go on from the newest checkpoint, after the data that did it."""


class Divergence:
    """Watches loss and gradient; its answer is the same on all ranks if what it is told is."""

    def __init__(self, *, max_skipped_steps: int, explosion_factor: float) -> None:
        """Know nothing yet.

        Args:
            max_skipped_steps: steps in a row whose gradient was not finite that are borne.
            explosion_factor: of its running mean above which a positive loss is too large; in
                general, that less 1 times the mean absolute value is how far it may be above.
        """
        self.max_skipped_steps = max_skipped_steps
        self.explosion_factor = explosion_factor
        self.skipped = 0
        """Steps in a row, up to the last one."""
        self.exploded = 0
        """Steps in a row, up to the last one."""
        self._mean = 0.0
        self._size = 0.0  # mean of its absolute value: a loss may be negative, or cross 0
        self._seen = 0

    @property
    def suspect(self) -> bool:
        """Whether the last step was bad, so that it is no state to come back to."""
        return bool(self.skipped or self.exploded)

    def observe(self, step: int, loss: float, *, applied: bool) -> None:
        """Take in a step.

        Args:
            step: for the message.
            loss: mean over the global batch.
            applied: whether its gradient was finite, and the weights have moved.

        Raises:
            DivergedError: too many bad steps in a row.
        """
        self.skipped = 0 if applied else self.skipped + 1
        if self.skipped > self.max_skipped_steps:
            raise DivergedError(
                f"The gradient was not finite in {self.skipped} steps in a row, up to step {step}."
            )
        if not applied or not math.isfinite(loss):
            return
        # The factor times the mean, where losses are positive.
        bar = self._mean + (self.explosion_factor - 1.0) * self._size
        large = self._seen >= _HORIZON and loss > bar
        self.exploded = self.exploded + 1 if large else 0
        if self.exploded >= _IN_A_ROW:
            raise DivergedError(
                f"The loss was above {bar:.3g} (train.explosion_factor={self.explosion_factor:g}; "
                f"usual: {self._mean:.3g}) in {self.exploded} steps in a row, up to step {step}."
            )
        if not large:
            self._seen += 1
            self._mean += (loss - self._mean) / min(self._seen, _HORIZON)
            self._size += (abs(loss) - self._size) / min(self._seen, _HORIZON)
