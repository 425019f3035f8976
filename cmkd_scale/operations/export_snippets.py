"""Code of a model card: loads an exported model with published libraries, without this project.

The small encoders are no models of transformers', so their own source is part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from cmkd_scale.models import encoders
from cmkd_scale.models.model import Model
from cmkd_scale.operations.exported import DESCRIPTION, GRAPH, HEAD, WEIGHTS
from cmkd_scale.stages.common import ModelSpec

_PROJECTION = """\
projection = nn.Sequential(
    nn.Linear({pooled}, {hidden}),
    nn.LayerNorm({hidden}),
    nn.GELU(),
    nn.Linear({hidden}, {features}),
    nn.LayerNorm({features}, elementwise_affine=False),
)
head = nn.Linear({features}, {classes})
parts = nn.ModuleDict({{"projection": projection, "head": head}})
parts.load_state_dict(load_file(f"{{directory}}/{HEAD}"))
with open(f"{{directory}}/{DESCRIPTION}") as file:
    label_names = json.load(file)["label_names"]
"""
_CLASSIFY = '''\
@torch.no_grad()
def classify(inputs):
    """{inputs} -> features [B, {features}], logits [B, {classes}]"""
    features = projection(encoder(inputs)[0])
    return features, head(features)
'''
_GRAPH = '''\
import json

import onnxruntime

directory = "."  # a copy of this repository
session = onnxruntime.InferenceSession(f"{{directory}}/{GRAPH}")
with open(f"{{directory}}/{DESCRIPTION}") as file:
    label_names = json.load(file)["label_names"]


def classify({names}):
    """numpy arrays: {inputs} -> features [B, {features}], logits [B, {classes}]"""
    return session.run(["features", "logits"], {feeds})
'''


def torch_snippet(model: Model, spec: ModelSpec, inputs: str) -> str:
    """A program that ends in ``classify(inputs)``, with torch, safetensors and transformers.

    Args:
        model: the exported one.
        spec: how it is built.
        inputs: what it reads, in words.
    """
    sizes = {
        "pooled": model.projection[0].in_features,
        "hidden": 2 * spec.feature_dim,
        "features": spec.feature_dim,
        "classes": len(spec.label_names),
    }
    return "\n".join(
        [
            "from __future__ import annotations\n",
            "import json\n",
            "import torch",
            "from safetensors.torch import load_file",
            "from torch import Tensor, nn\n",
            'directory = "."  # a copy of this repository\n\n',
            _builtin(model.encoder, spec),
            _PROJECTION.format(HEAD=HEAD, DESCRIPTION=DESCRIPTION, **sizes),
            "",
            _CLASSIFY.format(inputs=inputs, **sizes),
        ]
    )


def graph_snippet(names: Sequence[str], spec: ModelSpec, inputs: str) -> str:
    """The same for the graph, with onnxruntime alone."""
    return _GRAPH.format(
        GRAPH=GRAPH,
        DESCRIPTION=DESCRIPTION,
        names=", ".join(names),
        feeds="{" + ", ".join(f'"{name}": {name}' for name in names) + "}",
        inputs=inputs,
        features=spec.feature_dim,
        classes=len(spec.label_names),
    )


def _builtin(encoder: nn.Module, spec: ModelSpec) -> str:
    """The source of a small encoder, one of it, and its weights into it."""
    kind = type(encoder)
    parts: list[Any] = [kind]
    if kind is encoders.ResNetEncoder:
        parts.insert(0, encoders.batch_norm_to_group_norm)
        options = {"channels": spec.shape[-3], "width": spec.width, "depth": spec.depth}
    elif kind is encoders.ByteTransformer:
        options = {"max_bytes": spec.shape[0], "width": spec.width, "depth": spec.depth}
    else:
        size = spec.shape[0] * spec.shape[1]
        options = {"size": size, "width": spec.width, "depth": spec.depth}
    arguments = ", ".join(f"{name}={value}" for name, value in options.items())
    return "\n\n".join(
        [
            *(f"{inspect.getsource(part)}" for part in parts),
            f"encoder = {kind.__name__}({arguments}).eval()\n"
            f'weights = load_file(f"{{directory}}/{WEIGHTS}")\n'
            "encoder.load_state_dict(\n"
            '    {name.removeprefix("encoder."): value for name, value in weights.items()}\n'
            ")\n",
        ]
    )
