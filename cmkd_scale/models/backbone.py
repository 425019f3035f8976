"""Backbones of ``transformers``, pretrained or from a configuration, as encoders.

With ``encoders.py`` the door of ``transformers``' models, and that of ``peft``. What differs from
family to family is in ``families.py``; widths, stages and the parameters that have no part in the
pooled output are found by passing one sample through.

Nothing here draws at random or mixes the samples of a batch, since the result would depend on how
a batch is split over processes: dropout, stochastic depth and SpecAugment are off; BatchNorm keeps
the statistics that it was pretrained with (a random one becomes GroupNorm).
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cmkd_scale.errors import UsageError
from cmkd_scale.models.backbone_spec import BackboneSpec
from cmkd_scale.models.families import TIME_FIRST, pool
from cmkd_scale.models.normalisation import batch_norm_to_group_norm
from cmkd_scale.models.pretrained import config_object, has_text_encoder, line_of, make_model
from cmkd_scale.models.stock import Stock

_DO_NOT_FIT = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What models raise of samples, or options, that they cannot take."""


class BackboneEncoder(nn.Module):
    """A backbone and its pooling: samples to ``(pooled [B, W], stages)``."""

    def __init__(self, backbone: Any, spec: BackboneSpec) -> None:
        """Take a model of ``transformers``.

        Args:
            backbone: of ``spec.config``.
            spec: how it reads, pools and learns.
        """
        super().__init__()
        self.spec = spec
        self.keep_stages = False
        """Whether the outputs of its blocks are returned, too: they take memory."""
        self.has_group_norm = not spec.pretrained and batch_norm_to_group_norm(backbone) > 0
        self.backbone = backbone
        self.out_dim = 0
        self._input = str(backbone.main_input_name)
        self._time_first = spec.config["model_type"] in TIME_FIRST
        self._padding = 0 if spec.padding is None else spec.padding
        self._pad_token = int(spec.config.get("pad_token_id") or 0)

    @property
    def model(self) -> Any:
        """The model itself, without adapters around it."""
        inner: Any = self.backbone
        return inner.get_base_model() if self.spec.tuning == "lora" else inner

    @property
    def blocks(self) -> list[nn.Module]:
        """Repeated parts, shallow to deep."""
        return repeated_parts(self.model)

    def train(self, mode: bool = True) -> BackboneEncoder:
        """Leave BatchNorm's statistics as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map a batch to ([B, W], stages); several pictures of a sample are averaged."""
        several = self._input == "pixel_values" and inputs.dim() == 5
        samples = inputs.flatten(0, 1) if several else inputs
        arguments, mask = self._arguments(samples)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.spec.tuning != "frozen"):
            output = self.backbone(**arguments, output_hidden_states=self.keep_stages)
        if self.spec.pooling == "pooled" and getattr(output, "pooler_output", None) is None:
            raise UsageError(
                "model.pooling=pooled: this backbone has no pooling of its own; choose cls or mean."
            )
        pooled = pool(output, self.spec.pooling, mask)
        stages = tuple(output.hidden_states[1:]) if self.keep_stages else ()
        if several:
            frames = inputs.shape[1]
            pooled = pooled.unflatten(0, (-1, frames)).mean(1)
            stages = tuple(stage.unflatten(0, (-1, frames)).mean(1) for stage in stages)
        return pooled, stages

    def _arguments(self, inputs: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the backbone is called with, and the mask [B, L] of what is not padding."""
        if self._input == "input_ids":
            given: Tensor = inputs.ne(self._padding)
            tokens = torch.where(given, inputs, self._pad_token)
            return {"input_ids": tokens, "attention_mask": given.long()}, given
        if self._input == "pixel_values":
            return {"pixel_values": inputs}, None
        if inputs.dim() == 4:  # [B, 1, M, T]: a built-in spectrogram
            inputs = inputs.squeeze(1)
            inputs = inputs.transpose(1, 2) if self._time_first else inputs
        if not self.spec.ragged:
            return {self._input: inputs}, None
        heard = inputs != 0 if inputs.dim() == 2 else (inputs != 0).any(2)
        mask: Tensor = heard.long().flip(1).cumsum(1).flip(1) > 0  # up to the last that is not 0
        arguments = {self._input: inputs}
        if self.spec.masked:
            arguments["attention_mask"] = mask.long()
        return arguments, mask

    def stock(self) -> Stock | None:
        """The model as ``transformers`` opens it, adapters merged; None: it has no such form."""
        if self.has_group_norm:
            return None
        model = self.model
        if self.spec.tuning == "lora":
            merged: Any = copy.deepcopy(self.backbone)
            model = merged.merge_and_unload()
        config = config_object(self.spec.config)
        text = has_text_encoder(config)
        inside = bool(config.is_encoder_decoder) and not text
        return Stock.make(
            config,
            model,
            loader="AutoModelForTextEncoding" if text else "AutoModel",
            attribute="encoder" if inside else "",
        )


def build_backbone(
    spec: BackboneSpec, shape: tuple[int, ...], directory: Path | None = None
) -> BackboneEncoder:
    """An encoder with random weights, or with those in a directory.

    Args:
        spec: of the backbone.
        shape: of one decoded sample.
        directory: in hub layout, with weights.

    Raises:
        UsageError: samples of this shape do not fit, or the weights do not.
    """
    out_dim, unused = _probe(json.dumps(spec.to_json()), shape)
    try:
        backbone = make_model(spec.config, spec.attention, directory)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UsageError(
            f"The weights in {directory} cannot be loaded ({line_of(error)}). Copy or download "
            "them again."
        ) from None
    if directory is not None:
        _refuse_missing(backbone.missing_weights - unused, directory)
    encoder = BackboneEncoder(backbone, spec)
    encoder.out_dim = out_dim
    for name, parameter in encoder.backbone.named_parameters():
        parameter.requires_grad_(spec.tuning == "full" and name not in unused)
    if spec.tuning == "lora":
        encoder.backbone = _with_adapters(encoder.backbone, spec, unused)
    return encoder


def _refuse_missing(missing: frozenset[str], directory: Path) -> None:
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise UsageError(
            f"The weights in {directory} lack {len(missing)} of the backbone's, or have them in "
            f"other shapes ({some}): they would be random. Check "
            "that its config.json is that of its weights, and model.backbone_config."
        )


def _with_adapters(backbone: Any, spec: BackboneSpec, unused: frozenset[str]) -> Any:
    """The backbone inside low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError(
            "model.tuning=lora needs peft: pip install 'cmkd_scale[lora]', or set model.tuning to "
            "full or frozen."
        ) from None
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        target_modules=list(spec.lora_targets) or "all-linear",
    )
    try:
        with warnings.catch_warnings():
            # peft asks by a name that newer versions of transformers deprecate.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = get_peft_model(backbone, config)
    except ValueError as error:
        raise UsageError(
            f"model.tuning=lora finds no layer to adapt in {type(backbone).__name__} "
            f"({line_of(error)}). Name linear layers with model.lora_targets, or set model.tuning "
            "to full or frozen."
        ) from None
    modules = {name.rpartition(".")[0] for name in unused}
    for name, module in adapted.get_base_model().named_modules():
        if name and name in modules:  # has no part in the output
            module.requires_grad_(False)
    return adapted


@functools.lru_cache(maxsize=32)
def _probe(spec_json: str, shape: tuple[int, ...]) -> tuple[int, frozenset[str]]:
    """Width of the pooled output, and the parameters that have no part in it."""
    spec = BackboneSpec.from_json(json.loads(spec_json))
    with suppress(*_DO_NOT_FIT):  # what looks at values cannot run without any
        return _pass_one(spec, shape, "meta")
    try:
        return _pass_one(spec, shape, "cpu")
    except _DO_NOT_FIT as error:
        family = spec.config["model_type"]
        raise UsageError(
            f"The backbone ({family}) cannot read samples of shape {list(shape)} with "
            f"model.pooling={spec.pooling} ({line_of(error)}). Set sizes with data.transform or "
            "model.backbone_config so that they fit."
        ) from None


def _pass_one(
    spec: BackboneSpec, shape: tuple[int, ...], device: str
) -> tuple[int, frozenset[str]]:
    trained = replace(spec, tuning="full")
    # The next numbers drawn must not depend on whether the answer was known already.
    with torch.random.fork_rng(), torch.device(device), torch.enable_grad():
        encoder = BackboneEncoder(make_model(spec.config, spec.attention), trained).train()
        text = len(shape) == 1 and spec.padding is not None
        if text:
            _refuse_long_texts(encoder.backbone, shape[0])
        kind = torch.int64 if text else torch.float32
        pooled, _ = encoder(torch.ones(1, *shape, dtype=kind))
        pooled.float().sum().backward()
    unused = (name for name, p in encoder.backbone.named_parameters() if p.grad is None)
    return pooled.shape[1], frozenset(unused)


def _refuse_long_texts(backbone: nn.Module, length: int) -> None:
    """Texts longer than a table of positions would fail when the first of them comes."""
    for name, table in backbone.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name:
            # Some families leave out the places up to that of padding, or the first ones.
            skipped = getattr(table, "offset", 0)
            skipped = skipped if table.padding_idx is None else table.padding_idx + 1
            places = table.num_embeddings - skipped
            if length > places:
                raise UsageError(
                    f"The backbone ({type(backbone).__name__}) knows {places} positions, and texts "
                    f"have up to {length} tokens: set data.transform.max_tokens lower."
                )


def repeated_parts(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that ``transformers`` recomputes as one, or else its listed layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = _innermost(model, GradientCheckpointingLayer)
    if found:
        return found
    lists = _innermost(model, nn.ModuleList)
    return [layer for layers in lists for layer in layers.children()]


def _innermost(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Modules of a kind that hold no other of it, in order."""
    return [
        module
        for module in model.modules()
        if isinstance(module, kind)
        and not any(isinstance(m, kind) for m in module.modules() if m is not module)
    ]
