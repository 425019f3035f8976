"""The type that losses are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float(values: Tensor) -> Tensor:
    """In float32, whatever a model computes in; float64 stays what it is, for exact tests."""
    return values if values.dtype == torch.float64 else values.float()
