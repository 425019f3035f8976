"""One rule that makes any config small enough for a test, and keeps what it says of its data.

Sizes and numbers of steps shrink; names, kinds and structure stay, so that what a config gets
wrong in full is wrong when it is small. A backbone of the hub becomes a random model of the same
family in the hub's layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmkd_scale.config import Config, with_changes
from tests.configs.backbones import save_backbone

IMAGE_SIZE = 32  # a multiple of every patch
AUDIO_SIZES = {"n_mels": 32, "frames": 64}
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "embedding_size": 8,
}
"""Options of a backbone's configuration."""


def shrink(config: Config, hub: Path) -> Config:
    """The same run with little of everything.

    Args:
        config: as published.
        hub: directory for the small backbones.
    """
    changes: dict[str, Any] = {
        "data.workers": 0,
        "data.transform": _transform(config),
        "data.options": _builtin_options(config),
        "data.n_per_class": None if config.data.n_per_class is None else 1,
        "model.width": 8,
        "model.feature_dim": config.model.feature_dim and 16,
        "model.backbone_config": _backbone_config(config.model.backbone_config),
        "train.steps": 3,
        "train.global_batch_size": 4,
        "train.warmup_steps": 1,
    }
    if config.model.backbone is not None:
        changes["model.backbone"] = str(save_backbone(config.model.backbone, hub))
    return with_changes(config, changes)


def _builtin_options(config: Config) -> dict[str, str | int | float]:
    if not str(config.data.shards).startswith("builtin:"):
        return config.data.options
    return dict.fromkeys([*config.data.options, "n_per_class"], 1)


def _transform(config: Config) -> dict[str, float | int]:
    small: dict[str, float | int] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "seconds": 1}
    if config.data.modality == "audio":
        small |= AUDIO_SIZES  # a picture's frames are in its shards
    return {name: small.get(name, value) for name, value in config.data.transform.items()}


def _backbone_config(options: dict[str, Any]) -> dict[str, Any]:
    small = {name: SMALL.get(name, value) for name, value in options.items()}
    if "hidden_sizes" in small:
        small["hidden_sizes"] = [8 * 2**stage for stage in range(len(small["hidden_sizes"]))]
        small["depths"] = [1] * len(small["depths"])
    return small
