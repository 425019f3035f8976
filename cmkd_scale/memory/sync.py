"""Merging what the ranks found: the only collectives of the memory."""

from __future__ import annotations

import numpy as np
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


def gather_array(values: np.ndarray) -> np.ndarray:
    """Gather NumPy rows of all ranks in rank order."""
    gathered: np.ndarray = distributed.gather_rows(torch.from_numpy(values)).numpy()
    return gathered
