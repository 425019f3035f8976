"""A backbone as ``transformers`` opens it: what an export holds of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Stock:
    """Weights under the names of ``transformers``, and what loads them."""

    config: Any
    """A ``PreTrainedConfig``; ``save_pretrained`` writes it."""
    state: dict[str, Tensor]
    """Name -> value, each in memory of its own; what a module was loaded from may hold more."""
    loader: str
    """Class of ``transformers`` whose ``from_pretrained`` opens it."""
    attribute: str
    """Of the loaded model: what the backbone is; empty: itself."""

    @staticmethod
    def make(config: Any, model: nn.Module, *, loader: str, attribute: str = "") -> Stock:
        """Of a model, which is ``attribute`` of what is loaded."""
        prefix = f"{attribute}." if attribute else ""
        state = {
            prefix + name: value.detach().cpu().clone().contiguous()
            for name, value in model.state_dict().items()
        }
        return Stock(config, state, loader, attribute)
