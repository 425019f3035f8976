"""Exports as strangers use them: the graph, and the programs of the card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from cmkd_scale.stages.common import ModelSpec
from tests.operations.export_runs import make_run, make_spec, probe

RUNS = ("resnet of frames", "resnet of sound", "byte_transformer", "features")

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

    def outputs(
        self, batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Inputs, and the features and logits of the trained model."""
        inputs = probe(self.spec, batch, seed=batch)
        with torch.no_grad():
            output = self.model(inputs)
        return inputs.numpy(), output.features.numpy(), output.logits.numpy()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    made = []
    for name in RUNS:
        root = tmp_path_factory.mktemp("programs")
        case = Case(root / "export", make_run(root / "run", name), make_spec(name))
        assert export(root / "run", format="onnx", out=case.directory)["difference"]["onnx"] <= 1e-4
        np.savez(root / "inputs.npz", inputs=case.outputs(3)[0])
        made.append(case)
    return made


def test_the_graph_computes_what_the_model_does_at_any_batch_size(cases: list[Case]) -> None:
    for case in cases:
        graph = onnxruntime.InferenceSession(
            str(case.directory / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        for batch in (1, 2, 7):
            inputs, *expected = case.outputs(batch)
            found = graph.run(["features", "logits"], {"inputs": inputs})
            np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize(
    ("program", "blocked"),
    [(0, ["cmkd_scale"]), (1, ["cmkd_scale", "torch", "transformers"])],
    ids=["torch", "onnxruntime"],
)
def test_the_programs_of_the_card_need_nothing_of_ours(
    cases: list[Case], program: int, blocked: list[str]
) -> None:
    work = {
        "blocked": blocked,
        "directories": [str(case.directory) for case in cases],
        "program": program,
        "torch": program == 0,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(work), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        outputs = np.load(case.directory.parent / "outputs.npz")
        _, features, logits = case.outputs(3)
        np.testing.assert_allclose(outputs["features"], features, atol=1e-4)
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-4)
        assert tuple(json.loads(line)) == case.spec.label_names
