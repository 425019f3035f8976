"""What ranks tell each other about a step's alignment, and its way there beside backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


def joined(parts: Sequence[Outgoing], rows: int) -> Outgoing:
    """What the parts of a batch have to say together; of samples the first ``rows``."""
    if len(parts) == 1:
        return parts[0]
    kept = [part.rows for part in parts if part.rows is not None]
    return Outgoing(
        torch.stack([part.sums for part in parts]).sum(0), torch.cat(kept)[:rows] if kept else None
    )


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
