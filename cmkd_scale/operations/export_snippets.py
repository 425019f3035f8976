"""Code of a model card: loads an exported model with published libraries, without this project.

What transformers does not have (the small encoders, pooling) is there as our own source.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from cmkd_scale.models import encoders
from cmkd_scale.models.backbone import BackboneEncoder
from cmkd_scale.models.families import TIME_FIRST, pool
from cmkd_scale.models.model import Model
from cmkd_scale.models.normalisation import batch_norm_to_group_norm
from cmkd_scale.operations.export_inputs import input_names
from cmkd_scale.operations.exported import DESCRIPTION, GRAPH, HEAD, WEIGHTS, Description
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
def classify({names}):
    """{inputs}.

    Returns features [B, {features}] and logits [B, {classes}].
    """
{pooled}
    features = projection(pooled)
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
    """numpy arrays: {inputs}.

    Returns features [B, {features}] and logits [B, {classes}].
    """
    return session.run(["features", "logits"], {feeds})
'''
_SMALL = """\
encoder = {kind}({arguments}).eval()
weights = load_file(f"{{directory}}/{WEIGHTS}")
encoder.load_state_dict(
    {{name.removeprefix("encoder."): value for name, value in weights.items()}}
)
"""
_STOCK = "backbone = {loader}.from_pretrained(directory).eval(){attribute}\n"
_GROUP_NORM = """\
with open(f"{{directory}}/{DESCRIPTION}") as file:
    config = json.load(file)["model"]["backbone"]["config"]
backbone = AutoModel.from_config(AutoConfig.for_model(**config))
batch_norm_to_group_norm(backbone)
weights = load_file(f"{{directory}}/{WEIGHTS}")
backbone.load_state_dict(
    {{name.removeprefix("encoder.backbone."): value for name, value in weights.items()}}
)
backbone.eval()
"""
_HEARD = """\
heard = {values} != 0{any}
mask = heard.long().flip(1).cumsum(1).flip(1) > 0  # up to the last that is not 0
"""


def torch_snippet(described: Description, model: Model) -> str:
    """A program that ends in ``classify``, with torch, safetensors and transformers."""
    spec = described.spec
    sizes = {
        "pooled": model.projection[0].in_features,
        "hidden": 2 * spec.feature_dim,
        "features": spec.feature_dim,
        "classes": len(spec.label_names),
    }
    classes, opened, pooled = _encoder(described, model)
    names = input_names(model.encoder)
    classify = _CLASSIFY.format(
        **{
            **sizes,
            "names": ", ".join(names),
            "inputs": in_words(spec, names),
            "pooled": textwrap.indent(pooled.rstrip(), "    "),
        }
    )
    return "\n".join(
        [
            "from __future__ import annotations\n",
            "import json",
            "from typing import Any\n" if "Any" in opened else "",
            "import torch",
            "from safetensors.torch import load_file",
            "from torch import Tensor, nn",
            f"from transformers import {', '.join(classes)}\n" if classes else "",
            'directory = "."  # a copy of this repository\n\n',
            opened,
            _PROJECTION.format(HEAD=HEAD, DESCRIPTION=DESCRIPTION, **sizes),
            "",
            classify,
        ]
    )


def graph_snippet(described: Description, names: Sequence[str]) -> str:
    """The same for the graph, with onnxruntime alone."""
    spec = described.spec
    return _GRAPH.format(
        GRAPH=GRAPH,
        DESCRIPTION=DESCRIPTION,
        names=", ".join(names),
        feeds="{" + ", ".join(f'"{name}": {name}' for name in names) + "}",
        inputs=in_words(spec, names),
        features=spec.feature_dim,
        classes=len(spec.label_names),
    )


def in_words(spec: ModelSpec, names: Sequence[str]) -> str:
    """What a model reads."""
    sizes = ", ".join(map(str, spec.shape))
    if len(names) == 2:
        return f"{names[0]} and {names[1]} int64 [B, {sizes}], padded to that length"
    if spec.modality == "text":
        return f"{names[0]} int64 [B, {sizes}], bytes of UTF-8 + 1 and 0 behind the end"
    return f"{names[0]} float32 [B, {sizes}]"


def _encoder(described: Description, model: Model) -> tuple[list[str], str, str]:
    """Classes of transformers, the code that opens the encoder, and the code that calls it."""
    if not isinstance(model.encoder, BackboneEncoder):
        return _small(described, model.encoder)
    call = _call(described.spec, model.encoder)
    if not described.loads_with:
        code = _sources(pool, batch_norm_to_group_norm) + _GROUP_NORM.format(
            DESCRIPTION=DESCRIPTION, WEIGHTS=WEIGHTS
        )
        return ["AutoConfig", "AutoModel"], code, call
    loader, attribute = described.loads_with["class"], described.loads_with["attribute"]
    opened = _STOCK.format(loader=loader, attribute=f".{attribute}" if attribute else "")
    return [loader], _sources(pool) + opened, call


def _small(described: Description, encoder: Any) -> tuple[list[str], str, str]:
    spec, kind = described.spec, type(encoder)
    if kind is encoders.ByteTransformer:
        call = (
            "mask = inputs != 0\n"
            "output = backbone(input_ids=inputs, attention_mask=mask.long())\n"
            'pooled = pool(output, "mean", mask)'
        )
        loader = described.loads_with["class"]
        return [loader], _sources(pool) + _STOCK.format(loader=loader, attribute=""), call
    sources = []
    if kind is encoders.ResNetEncoder:
        sources = [batch_norm_to_group_norm]
        options = {"channels": spec.shape[-3], "width": spec.width, "depth": spec.depth}
    else:
        size = spec.shape[0] * spec.shape[1]
        options = {"size": size, "width": spec.width, "depth": spec.depth}
    opened = _SMALL.format(
        kind=kind.__name__,
        arguments=", ".join(f"{name}={value}" for name, value in options.items()),
        WEIGHTS=WEIGHTS,
    )
    return [], _sources(*sources) + _source(kind) + opened, "pooled = encoder(inputs)[0]"


def _call(spec: ModelSpec, encoder: BackboneEncoder) -> str:
    """Inputs to ``pooled``: what ``BackboneEncoder`` does for this backbone."""
    backbone = encoder.spec
    names = input_names(encoder)
    how = f'"{backbone.pooling}"'
    if len(names) == 2:
        return (
            "output = backbone(input_ids=input_ids, attention_mask=attention_mask)\n"
            f"pooled = pool(output, {how}, attention_mask != 0)"
        )
    values = names[0]
    lines, mask, masked = "", "None", ""
    several = values == "pixel_values" and len(spec.shape) == 4
    if several:
        lines = f"frames = {values}.shape[1]\n{values} = {values}.flatten(0, 1)\n"
    elif values != "pixel_values":
        if len(spec.shape) == 3:
            turn = ".transpose(1, 2)" if backbone.config["model_type"] in TIME_FIRST else ""
            lines = f"{values} = {values}.squeeze(1){turn}\n"
        if backbone.ragged:
            lines += _HEARD.format(
                values=values if len(spec.shape) == 1 else f"({values}",
                any="" if len(spec.shape) == 1 else ").any(2)",
            )
            mask = "mask"
            masked = ", attention_mask=mask.long()" if backbone.masked else ""
    lines += f"output = backbone({values}={values}{masked})\npooled = pool(output, {how}, {mask})"
    return lines + ("\npooled = pooled.unflatten(0, (-1, frames)).mean(1)" if several else "")


def _sources(*functions: Callable[..., Any]) -> str:
    return "".join(f"{inspect.getsource(function)}\n\n" for function in functions)


def _source(kind: type) -> str:
    """A module: how it is made and what it computes."""
    parts = [inspect.getsource(getattr(kind, name)) for name in ("__init__", "forward")]
    return f"class {kind.__name__}(nn.Module):\n" + "\n".join(parts) + "\n\n"
