from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import Tensor, nn

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from cmkd_scale.operations.export_onnx import OPSET, Graph, write_graph
from cmkd_scale.operations.exported import read_description
from tests.operations.export_runs import make_run, make_spec


def test_what_the_graph_says_of_itself(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "features")
    export(tmp_path / "run", format="onnx", out=tmp_path / "out")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    said = json.loads({entry.key: entry.value for entry in graph.metadata_props}["cmkd"])
    assert said["modality"] == "features"
    assert said["label_names"] == ["up", "down", "<b>left|right</b>"]
    assert said["preprocessing"] == read_description(tmp_path / "out").preprocessing
    first = graph.graph.input[0].type.tensor_type.shape.dim
    assert first[0].dim_param  # a name, not a number
    assert [dimension.dim_value for dimension in first[1:]] == [2, 6]
    assert "onnx" in (tmp_path / "out" / "README.md").read_text().split("---")[1]


class Stubborn(nn.Module):
    """Does what no graph can: looks at values."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (inputs if float(inputs.sum()) > 0 else -inputs).flatten(1), ()


def test_an_encoder_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    model = Model(Stubborn(), encoder_dim=12, feature_dim=8, classes=3).eval()
    with pytest.raises(UsageError, match=r"cannot be written as an ONNX graph.*safetensors"):
        write_graph(model, make_spec("features"), tmp_path / "model.onnx", {})


def test_a_graph_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "features")
    call = Graph.__call__

    def wrong(self: Graph, inputs: Any) -> Any:
        features, logits = call(self, inputs)
        return features, logits + np.float32(2e-4) * (len(logits) == 3)

    monkeypatch.setattr(Graph, "__call__", wrong)
    with pytest.raises(UsageError, match=r"onnxruntime differs from it by 0\.0002"):
        export(tmp_path / "run", format="onnx", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_graph_that_cannot_be_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", "features")
    call = Graph.__call__

    def specialised(self: Graph, inputs: Any) -> Any:
        if len(inputs["inputs"]) != 1:
            raise RuntimeError("Got: 3 Expected: 1")
        return call(self, inputs)

    monkeypatch.setattr(Graph, "__call__", specialised)
    with pytest.raises(UsageError, match=r"cannot be run with a batch of 3 .*--format safetensors"):
        export(tmp_path / "run", format="onnx", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_missing_package_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UsageError, match=r"needs onnxscript.*pip install 'cmkd_scale\[onnx\]'"):
        export(tmp_path / "nothing yet", format="onnx")


def test_a_damaged_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07 no graph")
    with pytest.raises(IntegrityError, match="no graph that onnxruntime can run"):
        Graph(tmp_path / "model.onnx")
