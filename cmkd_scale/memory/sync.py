"""Merging what the ranks found: the only collectives of the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.memory.statistics import Moments


def merge_moments(moments: Moments) -> None:
    """Replace each rank's moments by those of all samples; exact, so order-free."""
    for sums in moments.tensors():
        distributed.all_reduce_sum(sums)


def gather_sorted(index: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """Gather rows of all ranks, sorted by ``index`` [n] int64: the same on every rank."""
    everywhere = distributed.gather_rows(index)
    order = torch.argsort(everywhere, stable=True)
    return everywhere[order], *(distributed.gather_rows(part)[order] for part in rows)
