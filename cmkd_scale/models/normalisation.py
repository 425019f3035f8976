"""Normalisation that does not mix the samples of a batch."""

from __future__ import annotations

from torch import nn


def batch_norm_to_group_norm(module: nn.Module, channels_per_group: int = 8) -> int:
    """Replace every ``BatchNorm2d`` inside ``module`` by a fresh GroupNorm (Wu and He 2018).

    Returns:
        How many there were.
    """
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = max(1, child.num_features // channels_per_group)
            setattr(module, name, nn.GroupNorm(groups, child.num_features))
            replaced += 1
        else:
            replaced += batch_norm_to_group_norm(child, channels_per_group)
    return replaced
