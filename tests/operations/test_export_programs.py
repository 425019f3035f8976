"""Exports as strangers use them: the graph, and the programs of the card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from cmkd_scale.operations.exported import load_exported
from cmkd_scale.stages.common import ModelSpec
from tests.models.backbones import FAMILIES, save_backbone
from tests.operations.export_runs import make_backbone_run, make_run, make_spec, probe

pytestmark = pytest.mark.slow

SMALL = ("resnet of frames", "byte_transformer", "features")
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
}
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, float | int], str]] = {
    # Adapters to be merged; padding to be told; an encoder inside a model; no model of theirs.
    "vit": ({"tuning": "lora", "lora_rank": 2}, {}, "safetensors"),
    "hubert": ({}, {"seconds": 0.1}, "onnx"),
    "whisper": ({}, {}, "safetensors"),
    "byt5": ({}, {"max_tokens": 12}, "onnx"),
    "": ({"backbone_config": RESNET}, {"height": 32, "width": 32}, "safetensors"),
}
"""Section ``model``, transform and format by family."""
AUTOMODEL = {"byte_transformer", "vit", "hubert", "whisper", "byt5"}

RUNNER = '''
"""Run the programs of model cards where some packages cannot be imported."""
import json, os, re, sys
import numpy as np

work = json.load(sys.stdin)

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in work["blocked"]:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in work["blocked"]:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
for directory in work["directories"]:
    os.chdir(directory)
    card = open("README.md", encoding="utf-8").read()
    names = {}
    exec(re.findall(r"```python\\n(.*?)```", card, re.DOTALL)[work["program"]], names)
    inputs = dict(np.load("../inputs.npz"))
    if work["torch"]:
        import torch
        inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
    features, logits = (np.asarray(x) for x in names["classify"](**inputs))
    np.savez("../outputs.npz", features=features, logits=logits)
    print(json.dumps(names["label_names"]))
'''


@dataclass(frozen=True)
class Case:
    """An export, and the trained model that it was made of."""

    directory: Path
    model: Model
    spec: ModelSpec
    result: dict[str, Any]

    def outputs(self, batch: int) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
        """Inputs by name, and the features and logits of the trained model."""
        inputs = probe(self.spec, batch, seed=batch)
        with torch.no_grad():
            output = self.model(inputs)
        names = {"hubert": "input_values", "whisper": "input_features", "t5": "input_ids"}
        family = None if self.spec.backbone is None else self.spec.backbone.config["model_type"]
        name = "inputs" if family is None else names.get(family, "pixel_values")
        named = {name: inputs.numpy()}
        if family == "t5":
            given = named[name] != -1
            named = {name: np.where(given, named[name], 0), "attention_mask": given.astype(int)}
        return named, output.features.numpy(), output.logits.numpy()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    made = {}
    for name in (*SMALL, *BACKBONES):
        root = tmp_path_factory.mktemp("programs")
        if name in SMALL:
            model, spec, format = make_run(root / "run", name), make_spec(name), "onnx"
        else:
            options, transform, format = BACKBONES[name]
            modality = FAMILIES[name].modality if name else "image"
            if name:
                options = {**options, "backbone": str(save_backbone(name, root / "hub"))}
            model, spec = make_backbone_run(root / "run", options, modality, transform)
        result = export(root / "run", format=format, out=root / "export")
        made[name] = Case(root / "export", model, spec, result)
        inputs: dict[str, Any] = made[name].outputs(3)[0]
        np.savez(root / "inputs.npz", **inputs)
    return made


def test_what_is_said_of_them(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        assert max(case.result["difference"].values()) <= 1e-5
        assert case.result["automodel"] == (name in AUTOMODEL)
        trained = [key for key in case.model.state_dict() if "lora_" not in key]
        counted = sum(
            value.numel() for key, value in case.model.named_parameters() if key in trained
        )
        assert case.result["parameters"] == counted
        exported = load_exported(case.directory)
        assert exported.modality.shape == exported.spec.shape == case.spec.shape
        text = (case.directory / "cmkd.json").read_text()
        assert str(case.directory.parent) not in text  # where its files lay is nobody's business


def test_the_graph_computes_what_the_model_does_at_any_batch_size(cases: dict[str, Case]) -> None:
    graphs = [case for case in cases.values() if (case.directory / "model.onnx").is_file()]
    assert len(graphs) == 5
    for case in graphs:
        graph = onnxruntime.InferenceSession(
            str(case.directory / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        for batch in (1, 2, 7):
            inputs, *expected = case.outputs(batch)
            found = graph.run(["features", "logits"], inputs)
            np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    ("program", "blocked"),
    [(0, ["cmkd_scale"]), (1, ["cmkd_scale", "torch", "transformers"])],
    ids=["torch", "onnxruntime"],
)
def test_the_programs_of_the_card_need_nothing_of_ours(
    cases: dict[str, Case], program: int, blocked: list[str]
) -> None:
    run = [case for case in cases.values() if program < len(case.result["difference"])]
    work = {
        "blocked": blocked,
        "directories": [str(case.directory) for case in run],
        "program": program,
        "torch": program == 0,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(work), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(run, done.stdout.splitlines(), strict=True):
        outputs = np.load(case.directory.parent / "outputs.npz")
        _, features, logits = case.outputs(3)
        np.testing.assert_allclose(outputs["features"], features, atol=1e-4)
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-4)
        assert tuple(json.loads(line)) == case.spec.label_names
