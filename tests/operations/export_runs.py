"""Runs to export: of every small encoder, made without training, which changes nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmkd_scale.config import Config, make_config, save_config
from cmkd_scale.files import to_json
from cmkd_scale.models.model import Model
from cmkd_scale.stages.backbones import (
    backbone_spec,
    keep_files,
    processor_for,
    weights_directory,
)
from cmkd_scale.stages.common import ModelSpec
from cmkd_scale.stages.streams import make_modality
from cmkd_scale.training.checkpoint import Checkpoint, save_checkpoint

STEPS = 5
SPECS: dict[str, tuple[str, dict[str, float | int]]] = {
    "resnet": ("image", {}),
    "resnet of frames": ("image", {"frames": 2, "height": 16, "width": 16, "channels": 3}),
    "resnet of sound": ("audio", {"n_mels": 20, "frames": 33}),
    "byte_transformer": ("text", {"max_bytes": 24}),
    "features": ("features", {"dim": 6, "frames": 2}),
}
"""Modality and transform by the name of a run."""


def small_spec(
    modality: str, transform: dict[str, float | int], *, width: int, label_names: tuple[str, ...]
) -> ModelSpec:
    """Of the usual small encoder."""
    return ModelSpec(
        modality=modality,
        transform=transform,
        encoder=None,
        shape=make_modality(modality, transform).shape,
        width=width,
        depth=1,
        feature_dim=8,
        label_names=label_names,
    )


def make_spec(name: str) -> ModelSpec:
    modality, transform = SPECS[name]
    names = ("up", "down", "<b>left|right</b>")
    return small_spec(modality, transform, width=16, label_names=names)


def make_run(
    run: Path,
    name: str = "byte_transformer",
    *,
    spec: ModelSpec | None = None,
    step: int = STEPS,
    weights: Mapping[str, Tensor] | None = None,
    average: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Write a run directory; returns the model that it is to be exported as.

    Args:
        run: made.
        name: key of ``SPECS``.
        spec: another model than that of the name.
        step: of the checkpoint; the run has ``STEPS``.
        weights: to replace some of the model's own.
        average: keep an average beside the weights, which is what counts then.
        config: further sections.
    """
    torch.manual_seed(0)
    spec = spec or make_spec(name)
    model = spec.build().eval()
    model.load_state_dict({**model.state_dict(), **(weights or {})})
    _write(run, model, spec, _config(run, config or {}), step, average)
    return model


def make_backbone_run(
    run: Path,
    options: Mapping[str, Any],
    modality: str,
    transform: Mapping[str, float | int] | None = None,
) -> tuple[Model, ModelSpec]:
    """The same with a backbone of ``transformers``.

    Args:
        run: made.
        options: section ``model``.
        modality: that it reads.
        transform: options of that.
    """
    torch.manual_seed(0)
    sections = {"model": dict(options), "data": {"transform": dict(transform or {})}}
    made = _config(run, sections)
    reads = make_modality(modality, made.data.transform, processor_for(made.model, modality))
    spec = ModelSpec(
        modality=modality,
        transform=made.data.transform,
        encoder=None,
        shape=reads.shape,
        width=made.model.width,
        depth=made.model.depth,
        feature_dim=8,
        label_names=("up", "down"),
        backbone=backbone_spec(made, modality, reads),
    )
    model = spec.build(weights_directory(made.model)).eval()
    with torch.no_grad():  # adapters begin at zero, where merging does nothing
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    run.mkdir()
    keep_files(made, spec.backbone, modality, run)
    _write(run, model, spec, made, STEPS, average=False)
    return model, spec


def _config(run: Path, sections: Mapping[str, Any]) -> Config:
    return make_config({"run": {"dir": str(run)}, "train": {"steps": STEPS}, **sections})


def _write(
    run: Path, model: Model, spec: ModelSpec, config: Config, step: int, average: bool
) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    files = {"model.safetensors": tensors}
    if average:
        files = {
            "model.safetensors": {key: value + 1 for key, value in tensors.items()},
            "ema.safetensors": tensors,
        }
    state = {
        "step": step,
        "samples_seen": 8 * step,
        "method": "ce_ls",
        "config_digest": config.digest(),
        "memory_digest": None,
        "teacher_digest": None,
        "loader": {"manifest": "0" * 64},
        "model": spec.to_json(),
    }
    save_checkpoint(run / "checkpoints", Checkpoint(state, files), keep=2)
    save_config(config, run / "config.yaml")
    (run / "env.json").write_bytes(to_json({"stage": "student"}))


def probe(spec: ModelSpec, batch: int, seed: int = 0) -> Tensor:
    """Inputs that a model of ``spec`` reads."""
    generator = torch.Generator().manual_seed(seed)
    if spec.modality != "text":
        noise = torch.randn(batch, *spec.shape, generator=generator)
        if spec.backbone is not None and spec.backbone.ragged:  # clips of half the length
            noise[:, spec.shape[0] // 2 :] = 0
        return noise
    texts = torch.randint(1, 257, (batch, *spec.shape), generator=generator)
    behind = torch.arange(spec.shape[0]) > torch.arange(batch)[:, None]
    return torch.where(behind, 0 if spec.backbone is None else -1, texts)
