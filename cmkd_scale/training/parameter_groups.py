"""Which parameters decay, and how fast each layer learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import nn

from cmkd_scale.models.model import Model

SCALE = "scale"
"""Key of a parameter group: what the learning rate of the schedule is multiplied by."""

_EXEMPT_DIMENSIONS = 1


def parameter_groups(
    module: nn.Module, model: Model, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Trained parameters of ``module`` in groups for AdamW.

    Weights decay; biases, norms and other vectors do not. With ``layer_decay`` below 1 the
    encoder's blocks learn the slower the farther they are from the head (Clark et al. 2020;
    Bao et al. 2022): the last block by that factor, its inputs' embedding slowest.

    Args:
        module: what is trained, ``model`` and anything around it.
        model: whose encoder has blocks.
        weight_decay: decoupled, of parameters with two dimensions or more.
        layer_decay: above 0, at most 1.
    """
    depth = _distance_from_head(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in module.parameters():
        if parameter.requires_grad:
            away = depth.get(id(parameter), 0) if layer_decay < 1 else 0
            groups[away, parameter.ndim > _EXEMPT_DIMENSIONS].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            SCALE: layer_decay**away,
        }
        for (away, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _distance_from_head(model: Model) -> dict[int, int]:
    """Blocks between each of the encoder's parameters and the head, by the parameter's id."""
    blocks = model.blocks
    distance = {id(p): len(blocks) + 1 for p in model.encoder.parameters()}
    for number, block in enumerate(blocks):
        distance.update(_same(block, len(blocks) - number))
    return distance


def _same(block: nn.Module, value: int) -> Iterator[tuple[int, int]]:
    return ((id(parameter), value) for parameter in block.parameters())
