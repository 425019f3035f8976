"""What differs between the families of backbones: what pools them, and the order of their axes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Pooling = Literal["cls", "mean", "pooled"]

MODALITY_OF_INPUT = {
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
    "input_ids": "text",
}
"""A model's main input -> what it reads."""

_FIRST_TOKEN = frozenset(
    {
        "beit",
        "data2vec-vision",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "ijepa",
        "vit",
        "vit_mae",
        "vit_msn",
    }
)
"""Families that end in a token which stands for the whole."""

_POOLED = frozenset(
    {
        "audio-spectrogram-transformer",
        "clip_vision_model",
        "siglip_vision_model",
        "siglip2_vision_model",
    }
)
"""Families with a pooling of their own that was trained along."""

TIME_FIRST = frozenset({"audio-spectrogram-transformer"})
"""Families that read spectrograms as [T, M]."""


def usual_pooling(model_type: str) -> Pooling:
    """What pools a family: its own pooling, its first token, or the mean over all."""
    if model_type in _POOLED:
        return "pooled"
    return "cls" if model_type in _FIRST_TOKEN else "mean"


def pool(output: Any, how: str, mask: Tensor | None) -> Tensor:
    """[B, W] of a backbone's output.

    Args:
        output: of a model of ``transformers``.
        how: ``cls``, ``mean`` or ``pooled``.
        mask: [B, L] of the input's positions that are not padding; None: all of them.
    """
    if how == "pooled":
        pooled: Tensor = output.pooler_output
        return pooled.flatten(1)
    hidden: Tensor = output.last_hidden_state
    if hidden.dim() == 4:  # [B, W, H, W']
        return hidden.mean((2, 3))
    if how == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    places = hidden.shape[1]
    if places != mask.shape[1]:
        # Each place covers a part of the input, as of convolutions over sound: those that lie
        # in it whole, and one at least.
        ends = torch.arange(1, places + 1, device=hidden.device) / places
        share = mask.sum(1, keepdim=True) / mask.shape[1]
        mask = ends <= share.clamp(min=1 / places) + 1e-6
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
