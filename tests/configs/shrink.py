"""One rule that makes any config small enough for a test, and keeps what it says of its data.

Sizes and numbers of steps shrink; names, kinds and structure stay, so that what a config gets
wrong in full is wrong when it is small. A backbone of the hub becomes a random model of the same
family in the hub's layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmkd_scale.config import Config, with_changes
from tests.models.backbones import save_backbone

FAMILIES = {
    "google/vit-large-patch16-224": "vit",
    "facebook/deit-small-patch16-224": "vit",
    "facebook/dinov2-large": "dinov2",
    "MIT/ast-finetuned-audioset-10-10-0.4593": "ast",
    "facebook/wav2vec2-large": "wav2vec2",
}
"""Backbone of a config -> key of ``tests.models.backbones.FAMILIES``."""

SMALL_BACKBONE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "embedding_size": 8,
}
IMAGE_SIZES: dict[str, float | int] = {"height": 32, "width": 32}
AUDIO_SIZES: dict[str, float | int] = {"n_mels": 32, "frames": 64, "seconds": 1}


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
        "model.width": min(config.model.width, 16),
        "model.feature_dim": config.model.feature_dim and 16,
        "model.backbone_config": _backbone_config(config.model.backbone_config),
        # Whatever these few samples say of the teacher, it teaches.
        "method.guard": False,
        "train.steps": 3,
        "train.global_batch_size": 4,
        "train.warmup_steps": 1,
    }
    return with_changes(with_small_backbone(config, hub), changes)


def with_small_backbone(config: Config, hub: Path) -> Config:
    """The config as it stands, but for a backbone of the hub, which is a small one.

    Args:
        config: as published.
        hub: directory for the small backbones.
    """
    if config.model.backbone is None:
        return config
    family = FAMILIES[config.model.backbone]
    return with_changes(config, {"model.backbone": str(save_backbone(family, hub / family))})


def _builtin_options(config: Config) -> dict[str, str | int | float]:
    if not str(config.data.shards).startswith("builtin:"):
        return config.data.options
    return dict.fromkeys([*config.data.options, "n_per_class"], 1)


def _transform(config: Config) -> dict[str, float | int]:
    # A picture's frames are in its shards.
    small = AUDIO_SIZES if config.data.modality == "audio" else IMAGE_SIZES
    return {name: small.get(name, value) for name, value in config.data.transform.items()}


def _backbone_config(options: dict[str, Any]) -> dict[str, Any]:
    small = {name: SMALL_BACKBONE.get(name, value) for name, value in options.items()}
    if "hidden_sizes" in small:
        small["hidden_sizes"] = [8 * 2**stage for stage in range(len(small["hidden_sizes"]))]
        small["depths"] = [1] * len(small["depths"])
    return small
