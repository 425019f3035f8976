"""Exported models with random weights, of what modality a test asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from tests.operations.export_runs import make_run, small_spec

LABELS = ("zero", "one", "two", "three", "four", "five", "six")


def write_random(
    directory: Path,
    modality: str,
    transform: Mapping[str, float | int] | None = None,
    *,
    graph: bool = False,
) -> Model:
    """Write a small model of the modality, and its graph if asked for; returns it."""
    spec = small_spec(modality, dict(transform or {}), width=8, label_names=LABELS)
    run = directory.with_name(f"run of {directory.name}")
    model = make_run(run, spec=spec)
    export(run, format="onnx" if graph else "safetensors", out=directory)
    return model
