"""Files into backbones of ``transformers``, through the processors that come with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax

from cmkd_scale.models.model import Model
from cmkd_scale.operations.export import export
from cmkd_scale.operations.exported import HEAD
from cmkd_scale.operations.predict import Prediction, predict
from cmkd_scale.operations.predict_files import Failure
from tests.data import senses
from tests.models.backbones import FAMILIES, save_backbone
from tests.operations.export_runs import make_backbone_run
from tests.operations.test_predict_hostile import BAD, FINE

t: Any = transformers


def export_backbone(root: Path, family: str, format: str = "safetensors") -> tuple[Path, Model]:
    backbone = save_backbone(family, root / "backbone")
    options = {"backbone": str(backbone)}
    model, _ = make_backbone_run(root / "run", options, FAMILIES[family].modality)
    export(root / "run", format=format, out=root / "export")
    return root / "export", model


def write_samples(root: Path, modality: str) -> list[Path]:
    extension, made = senses.MEMBERS[modality]
    files = [root / f"{label}.{extension}" for label in range(3)]
    for label, file in enumerate(files):
        file.write_bytes(made(label, label))
    return files


def test_a_text_model_agrees_with_its_own_parts(tmp_path: Path) -> None:
    """Tokenizer, network, mean and head one after the other, by transformers and torch."""
    directory, _ = export_backbone(tmp_path, "bert", "onnx")
    files = write_samples(tmp_path, "text")
    network = t.AutoModel.from_pretrained(directory).eval()
    head = load_file(directory / HEAD)
    tokenizer = t.AutoTokenizer.from_pretrained(directory)
    by_torch = predict(directory, files, top_k=1)
    by_onnx = predict(directory, files, top_k=1, backend="onnx", batch_size=2)
    assert len({outcome.source for outcome in by_torch}) == 3
    for file, one, other in zip(files, by_torch, by_onnx, strict=True):
        tokens = tokenizer(file.read_text(), return_tensors="pt")
        with torch.no_grad():
            features = network(**tokens).last_hidden_state.mean(1)
            hidden = features @ head["projection.0.weight"].T + head["projection.0.bias"]
            hidden = torch.nn.functional.layer_norm(
                hidden, hidden.shape[-1:], head["projection.1.weight"], head["projection.1.bias"]
            )
            hidden = torch.nn.functional.gelu(hidden)
            hidden = hidden @ head["projection.3.weight"].T + head["projection.3.bias"]
            hidden = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
            logits = hidden @ head["head.weight"].T + head["head.bias"]
        assert isinstance(one, Prediction)
        assert isinstance(other, Prediction)
        expected = softmax(logits[0].double().numpy())
        assert one.label == ("up", "down")[int(np.argmax(expected))] == other.label
        assert one.probability == pytest.approx(expected.max(), rel=1e-4)
        assert other.probability == pytest.approx(expected.max(), rel=1e-4)


@pytest.mark.parametrize("family", ["vit", "wav2vec2", "whisper", "byt5"])
def test_bad_files_end_no_processor(tmp_path: Path, family: str) -> None:
    directory, _ = export_backbone(tmp_path, family)
    modality = FAMILIES[family].modality
    files = write_samples(tmp_path, modality)
    fine = {name: content for name, (kind, content) in FINE.items() if kind == modality}
    fine |= {f"{w} x {h}.png": blank(w, h) for w, h in SIZES if modality == "image"}
    bad = {name: content for name, (kind, content) in BAD.items() if kind == modality}
    if family == "whisper":  # whose spectrogram is of powers, and here beyond float32
        bad["loud.wav"] = fine.pop("loud.wav")
    for name, content in {**fine, **bad}.items():
        (tmp_path / name).write_bytes(content)
        files.append(tmp_path / name)
    outcomes = predict(directory, files)
    assert len(outcomes) == len(files)
    for outcome, file in zip(outcomes, files, strict=True):
        assert outcome.source.name == str(file)
        failed = isinstance(outcome, Failure)
        assert failed == (file.name in bad), (file.name, outcome)


SIZES = [(1, 1), (1, 3), (3, 1), (3, 3), (1, 4000), (4000, 1)]


def blank(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "orange").save(buffer, "PNG")
    return buffer.getvalue()
