"""What an exported model is given: tensors under the names that transformers has for them.

A text is one tensor here, with a number of its own behind its end, and two there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cmkd_scale.models.backbone import BackboneEncoder
from cmkd_scale.stages.common import ModelSpec

INPUTS = "inputs"
"""Of a small encoder."""
_TEXT = ("input_ids", "attention_mask")


def input_names(encoder: nn.Module) -> tuple[str, ...]:
    """Names of what an encoder reads."""
    if not isinstance(encoder, BackboneEncoder):
        return (INPUTS,)
    name = str(encoder.model.main_input_name)
    return _TEXT if name in _TEXT else (name,)


def named_inputs(names: Sequence[str], spec: ModelSpec, inputs: Tensor) -> dict[str, Tensor]:
    """A decoded batch [B, ...] by the names of ``input_names``, or of a graph's inputs."""
    backbone = spec.backbone
    if backbone is None or backbone.padding is None:
        return {names[0]: inputs}
    given = inputs != backbone.padding
    token = int(backbone.config.get("pad_token_id") or 0)
    return {"input_ids": torch.where(given, inputs, token), "attention_mask": given.long()}


def joined_inputs(named: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
    """The inverse of ``named_inputs``."""
    backbone = spec.backbone
    if backbone is None or backbone.padding is None:
        return next(iter(named.values()))
    return torch.where(named["attention_mask"] != 0, named["input_ids"], backbone.padding)


def probe(spec: ModelSpec, batch: int) -> Tensor:
    """A batch to compare with: noise, or tokens of texts; of several lengths, where there are."""
    generator = torch.Generator().manual_seed(batch)
    padding, ragged = 0, spec.backbone is not None and spec.backbone.ragged
    if spec.modality == "text":
        tokens, ragged = 257, True
        if spec.backbone is not None:
            padding, tokens = spec.backbone.padding or 0, int(spec.backbone.config["vocab_size"])
        inputs = torch.randint(1, tokens, (batch, *spec.shape), generator=generator)
    else:
        inputs = torch.randn(batch, *spec.shape, generator=generator)
    if ragged:
        least = -(-spec.shape[0] // 4)
        lengths = torch.randint(least, spec.shape[0] + 1, (batch, 1), generator=generator)
        inputs[torch.arange(spec.shape[0]) >= lengths] = padding
    return inputs
