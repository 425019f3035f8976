"""Exported models with random weights, of what modality a test asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from cmkd_scale.stages.common import ModelSpec
from cmkd_scale.stages.streams import make_modality
from tests.operations.export_runs import make_run

LABELS = ("zero", "one", "two", "three", "four", "five", "six")


def write_random(
    directory: Path,
    modality: str,
    transform: Mapping[str, float | int] | None = None,
    *,
    graph: bool = False,
) -> Model:
    """Write a small model of the modality, and its graph if asked for; returns it."""
    options = dict(transform or {})
    spec = ModelSpec(
        modality=modality,
        transform=options,
        encoder=None,
        shape=make_modality(modality, options).shape,
        width=8,
        depth=1,
        feature_dim=8,
        label_names=LABELS,
    )
    run = directory.with_name(f"run of {directory.name}")
    model = make_run(run, spec=spec)
    export(run, format="onnx" if graph else "safetensors", out=directory)
    return model
