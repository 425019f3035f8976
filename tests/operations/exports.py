"""Exported models with random weights, as ``cmkd export`` would write them, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from cmkd_scale.files import file_digest, to_json
from cmkd_scale.models.model import Model
from cmkd_scale.operations.export_onnx import write_graph
from cmkd_scale.operations.exported import DESCRIPTION, GRAPH, HEAD, WEIGHTS, Description
from cmkd_scale.stages.common import ModelSpec
from cmkd_scale.stages.streams import make_modality

LABELS = ("zero", "one", "two", "three", "four", "five", "six")


def write_random(
    directory: Path,
    modality: str,
    transform: Mapping[str, float | int] | None = None,
    *,
    label_names: tuple[str, ...] = LABELS,
    graph: bool = False,
) -> Model:
    """Write a small model of the modality; returns it."""
    torch.manual_seed(0)
    shape = make_modality(modality, transform or {}).shape
    spec = ModelSpec(
        modality=modality,
        transform=dict(transform or {}),
        encoder=None,
        shape=shape,
        width=8,
        depth=1,
        feature_dim=8,
        label_names=label_names,
    )
    model = spec.build().eval()
    directory.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    encoder = {name for name in weights if name.startswith("encoder.")}
    save_file({name: weights[name] for name in encoder}, directory / WEIGHTS)
    save_file({name: weights[name] for name in weights.keys() - encoder}, directory / HEAD)
    if graph:
        example = torch.zeros(2, *shape, dtype=torch.int64 if modality == "text" else None)
        name = "input_ids" if modality == "text" else "inputs"
        write_graph(model, {name: example}, directory / GRAPH, {})
    described = Description(
        directory=directory,
        spec=spec,
        preprocessing={},
        loads_with={},
        provenance={},
        files={file.name: file_digest(file) for file in directory.iterdir()},
    )
    (directory / DESCRIPTION).write_bytes(to_json(described.to_json()))
    return model
