"""Small encoders that learn from nothing; those that are pretrained are in ``backbone.py``.

An encoder maps a batch of one modality to
``(pooled [B, W], stages)``, states its width W as ``out_dim`` and lists its repeated parts,
shallow to deep, as ``blocks``: what is sharded, recomputed or compiled as one. No layer here
mixes the samples of a batch: BatchNorm would make the result depend on how a batch is split
over processes, so it is replaced by GroupNorm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.models.families import pool
from cmkd_scale.models.normalisation import batch_norm_to_group_norm
from cmkd_scale.models.stock import Stock


class ResNetEncoder(nn.Module):
    """A ResNet (He et al. 2016) over images or log-mels, pooled to a small grid.

    The grid keeps what is left and right (or early and late) apart, which a global mean
    would lose: "27" and "72" must differ.
    """

    def __init__(
        self, *, channels: int, width: int, depth: int, pool_grid: tuple[int, int] = (1, 4)
    ) -> None:
        """Build for inputs [B, channels, height, width].

        Args:
            channels: channels of the input.
            width: channels of the first stage; doubled at each of three stages.
            depth: residual blocks a stage.
            pool_grid: rows and columns of the pooled map.
        """
        from transformers import ResNetConfig, ResNetModel

        super().__init__()
        widths = [width, 2 * width, 4 * width]
        config = ResNetConfig(
            num_channels=channels,
            embedding_size=width,
            hidden_sizes=widths,
            depths=[depth] * len(widths),
            layer_type="basic",
        )
        self.backbone = ResNetModel(config)
        batch_norm_to_group_norm(self.backbone)
        self.pool = nn.AdaptiveAvgPool2d(pool_grid)
        self.out_dim = widths[-1] * pool_grid[0] * pool_grid[1]

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks, shallow to deep."""
        stages = self.backbone.encoder.stages
        return [layer for stage in stages for layer in stage.layers]  # type: ignore[union-attr]

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map [B, channels, height, width] to ([B, W], stages).

        Several pictures of a sample, [B, frames, channels, height, width], are encoded each and
        averaged.
        """
        several = inputs.dim() == 5
        pictures = inputs.flatten(0, 1) if several else inputs
        output = self.backbone(pictures, output_hidden_states=True)
        pooled = self.pool(output.last_hidden_state).flatten(1)
        stages = tuple(output.hidden_states[1:])
        if several:
            frames = inputs.shape[1]
            pooled = pooled.unflatten(0, (-1, frames)).mean(1)
            stages = tuple(stage.unflatten(0, (-1, frames)).mean(1) for stage in stages)
        return pooled, stages

    def stock(self) -> Stock | None:
        """None: ``transformers`` has no ResNet with GroupNorm."""
        return None


class ByteTransformer(nn.Module):
    """A small BERT (Devlin et al. 2019) over bytes, mean-pooled over what is not padding."""

    def __init__(self, *, max_bytes: int, width: int, depth: int) -> None:
        """Build for inputs [B, max_bytes] of byte value + 1, where 0 is padding.

        Args:
            max_bytes: longest input.
            width: hidden width, a multiple of 4.
            depth: layers.
        """
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=257,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=max_bytes,
            # Dropout masks would depend on how a batch is split over processes.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        )
        self.backbone = BertModel(config, add_pooling_layer=False)
        self.out_dim = width

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers, shallow to deep."""
        return list(self.backbone.encoder.layer)

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map int64 [B, max_bytes] to ([B, W], stages)."""
        mask = inputs != 0
        output = self.backbone(inputs, attention_mask=mask.long(), output_hidden_states=True)
        return pool(output, "mean", mask), tuple(output.hidden_states[1:])

    def stock(self) -> Stock | None:
        """See ``BackboneEncoder``."""
        return Stock.make(self.backbone.config, self.backbone, loader="AutoModel")


class FeatureEncoder(nn.Module):
    """Residual layers over features that another network has extracted."""

    def __init__(self, *, size: int, width: int, depth: int) -> None:
        """Build for inputs [B, frames, dim].

        Args:
            size: frames * dim.
            width: hidden width.
            depth: residual blocks.
        """
        super().__init__()
        self.entry = nn.Sequential(nn.Flatten(), nn.LayerNorm(size), nn.Linear(size, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(depth)
        )
        self.out_dim = width

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map [B, frames, dim] to ([B, W], stages)."""
        hidden = self.entry(inputs)
        stages = []
        for block in self.blocks:
            hidden = hidden + block(hidden)
            stages.append(hidden)
        return hidden, tuple(stages)

    def stock(self) -> Stock | None:
        """None: it is no model of ``transformers``."""
        return None


def _resnet(shape: tuple[int, ...], width: int, depth: int) -> nn.Module:
    return ResNetEncoder(channels=shape[-3], width=width, depth=depth)


def _byte_transformer(shape: tuple[int, ...], width: int, depth: int) -> nn.Module:
    return ByteTransformer(max_bytes=shape[0], width=width, depth=depth)


def _feature_encoder(shape: tuple[int, ...], width: int, depth: int) -> nn.Module:
    return FeatureEncoder(size=shape[0] * shape[1], width=width, depth=depth)


ENCODERS: dict[str, Callable[[tuple[int, ...], int, int], nn.Module]] = {
    "resnet": _resnet,
    "byte_transformer": _byte_transformer,
    "features": _feature_encoder,
}
"""Name -> builder of (input shape, width, depth)."""

INPUT_RANKS = {"resnet": (3, 4), "byte_transformer": (1,), "features": (2,)}
"""Dimensions that one input sample of an encoder may have."""


def build_encoder(name: str | None, shape: tuple[int, ...], width: int, depth: int) -> nn.Module:
    """Build an encoder for samples of ``shape``.

    Args:
        name: key of ``ENCODERS``, or None for the usual one of that shape.
        shape: shape of one decoded sample.
        width: channels or hidden width.
        depth: blocks a stage, or layers.

    Raises:
        UsageError: unknown name, a name that does not fit the shape, or a bad width.
    """
    if name is None:
        name = _usual(shape)
    if name not in ENCODERS:
        raise UsageError(f"model.encoder '{name}' is unknown; {did_you_mean(name, ENCODERS)}")
    if len(shape) not in INPUT_RANKS[name]:
        ranks = " or ".join(map(str, INPUT_RANKS[name]))
        raise UsageError(
            f"model.encoder '{name}' takes samples with {ranks} dimensions, but this "
            f"modality's have shape {list(shape)}; use model.encoder={_usual(shape)}."
        )
    if width % 8:
        raise UsageError(f"model.width {width} must be a multiple of 8.")
    return ENCODERS[name](shape, width, depth)


def as_model_dtype(inputs: Tensor, module: nn.Module) -> Tensor:
    """Cast floating inputs to the module's parameter type; indices pass unchanged."""
    if not inputs.is_floating_point():
        return inputs
    return inputs.to(next(module.parameters(), torch.empty(0)).dtype)


def _usual(shape: tuple[int, ...]) -> str:
    return next(name for name, ranks in INPUT_RANKS.items() if len(shape) in ranks)
