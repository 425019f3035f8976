"""encoder + projection + head -> ModelOutput: the one model of teachers and students."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmkd_scale.models.backbone import build_backbone
from cmkd_scale.models.backbone_spec import BackboneSpec
from cmkd_scale.models.encoders import as_model_dtype, build_encoder
from cmkd_scale.records import ModelOutput


class Model(nn.Module):
    """A network for one modality.

    The projection maps the encoder's output to the shared feature space of width D, the
    space in which a student meets the memory's prototypes; the head is linear, so a
    teacher's head can be handed to a student.
    """

    def __init__(self, encoder: nn.Module, *, encoder_dim: int, feature_dim: int, classes: int):
        """Join an encoder of width ``encoder_dim`` to ``classes`` scores.

        Args:
            encoder: maps inputs to ``(pooled [B, encoder_dim], stages)``.
            encoder_dim: width of the pooled output.
            feature_dim: width D of the shared feature space.
            classes: number of classes C.
        """
        super().__init__()
        self.encoder = encoder
        hidden = 2 * feature_dim
        self.projection = nn.Sequential(
            nn.Linear(encoder_dim, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, feature_dim),
            # Without a scale of its own, every modality's features have the same length, so
            # that distances to another modality's prototypes are comparable.
            nn.LayerNorm(feature_dim, elementwise_affine=False),
        )
        self.head = nn.Linear(feature_dim, classes)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's repeated parts, shallow to deep."""
        blocks: Any = self.encoder.blocks
        return list(blocks)

    def keep_stages(self) -> None:
        """Return what the encoder's blocks say from now on, where it must be asked for."""
        encoder: Any = self.encoder
        encoder.keep_stages = True

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of blocks for the backward pass, which computes the rest again.

        Chen et al. 2016. Names of parameters stay what they are.
        """
        for block in self.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def compile_blocks(self) -> None:
        """Compile each block (``torch.compile``); equal ones share the code."""
        for block in self.blocks:
            block.compile()

    def forward(self, inputs: Tensor) -> ModelOutput:
        """Map a batch of inputs to features [B, D], logits [B, C] and the encoder's stages."""
        pooled, stages = self.encoder(as_model_dtype(inputs, self.encoder))
        features = self.projection(pooled)
        return ModelOutput(features=features, logits=self.head(features), stages=stages)


def build_model(
    *,
    encoder: str | None,
    shape: tuple[int, ...],
    width: int,
    depth: int,
    feature_dim: int,
    classes: int,
    backbone: BackboneSpec | None = None,
    weights: Path | None = None,
) -> Model:
    """Build a model for samples of ``shape``.

    Args:
        encoder: see ``build_encoder``, as of ``width`` and ``depth``.
        shape: of one decoded sample.
        width: of the encoder.
        depth: of the encoder.
        feature_dim: width of the shared feature space.
        classes: number of them.
        backbone: of ``transformers``, in the place of an encoder.
        weights: directory with the backbone's weights; None: random ones.

    Raises:
        UsageError: see ``build_encoder`` and ``build_backbone``.
    """
    if backbone is None:
        network = build_encoder(encoder, shape, width, depth)
    else:
        network = build_backbone(backbone, shape, weights)
    return Model(
        network,
        encoder_dim=int(network.out_dim),  # type: ignore[arg-type]
        feature_dim=feature_dim,
        classes=classes,
    )
