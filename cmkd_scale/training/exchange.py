"""What ranks tell each other about a step's alignment, and its way there beside backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cmkd_scale import distributed


class Outgoing(NamedTuple):
    """What this rank's batch has to say to all others."""

    sums: Tensor
    """[J + C + 3] mass sent to prototypes, samples of classes, then transported cost, mass sent
    to wrong classes, and samples."""
    rows: Tensor | None
    """[b, D + 1] features and labels of the first samples, if statistics of the student are
    kept."""


class Exchange(NamedTuple):
    """The same, on its way."""

    sums: distributed.Pending
    rows: distributed.Pending | None

    @property
    def bytes_on_wire(self) -> float:
        """What this rank sends."""
        return self.sums.bytes_on_wire + (self.rows.bytes_on_wire if self.rows else 0.0)

    def wait(self) -> None:
        """Until it is here."""
        self.sums.wait()
        if self.rows is not None:
            self.rows.wait()
