"""The whole story with real architectures: teacher, memory, student, export, prediction.

Each family once, as a small random model in the hub's layout, as teacher and as student of
another one's memory; nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmkd_scale import cli
from cmkd_scale.config import make_config
from cmkd_scale.operations.exported import load_exported
from cmkd_scale.operations.predict import Prediction, predict
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.common import load_trained
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.data.senses import MEMBERS, build_senses
from tests.models.backbones import FAMILIES, save_backbone

pytestmark = pytest.mark.slow

TAUGHT_BY = {"image": "audio", "audio": "image", "text": "image"}


class Stories:
    """Shards of three modalities, backbones, and a memory that each modality has left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for modality in MEMBERS:
            build_senses(root / modality, modality)

    def backbone(self, name: str) -> Path:
        directory = self.root / "hub" / name
        return directory if directory.exists() else save_backbone(name, directory)

    def tree(self, run: str, name: str, **sections: Any) -> dict[str, Any]:
        """The config of a small run of a family."""
        tree: dict[str, Any] = {
            "run": {"dir": str(self.root / run)},
            "data": {"shards": str(self.root / FAMILIES[name].modality)},
            "model": {"backbone": str(self.backbone(name)), "feature_dim": 8},
            "method": {"guard": False},
            "train": {
                "steps": 3,
                "global_batch_size": 6,
                "warmup_steps": 1,
                "checkpoint_every_steps": 3,
            },
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        return tree

    def memory_of(self, name: str) -> Path:
        """What a family has left as a teacher."""
        run = self.root / f"memory-{name}"
        if not run.exists():
            teacher(make_config(self.tree(f"teacher-{name}", name)), console=False)
            settings = {"run": {"dir": str(run)}}
            memory(
                make_config({**settings, "teacher": {"run": str(self.root / f"teacher-{name}")}})
            )
        return run


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Stories:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return Stories(tmp_path_factory.mktemp("families"))


def files_of(modality: str, directory: Path) -> list[Path]:
    extension, make = MEMBERS[modality]
    directory.mkdir()
    found = [directory / f"{number}.{extension}" for number in range(4)]
    for number, path in enumerate(found):
        path.write_bytes(make(number % 3, 2000 + number))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_teaches_learns_is_exported_and_predicts(
    name: str, stories: Stories, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality = FAMILIES[name].modality
    own = stories.memory_of(name)
    assert json.loads((own / "results.json").read_text())["metrics"]["memory/classes"] == 3
    other = next(n for n, family in FAMILIES.items() if family.modality == TAUGHT_BY[modality])
    learned = stories.tree(
        f"student-{name}",
        name,
        model={"tuning": "full" if name == "resnet" else "lora", "lora_rank": 2},
        memory={"run": str(stories.memory_of(other))},
    )
    results = student(make_config(learned), console=False)
    assert 0 <= results["metrics"]["test/accuracy"] <= 1
    run, out = stories.root / f"student-{name}", tmp_path / "out"
    capsys.readouterr()  # training in this process may have said something
    assert cli.main(["export", str(run), "--format", "onnx", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["automodel"]
    assert max(said["difference"].values()) <= 1e-4
    files = files_of(modality, tmp_path / "files")
    # What the trained student says of the same bytes, before any export.
    trained = load_trained(run, "student")
    reads = load_exported(out).modality
    extension, _ = MEMBERS[modality]
    inputs = torch.stack([reads.decode({extension: path.read_bytes()}) for path in files])
    with torch.no_grad():
        expected = torch.softmax(trained.model.eval()(inputs).logits.double(), 1).numpy()
    for backend in ("torch", "onnx"):
        outcomes = predict(out, files, top_k=3, backend=backend)
        for outcome, row in zip(outcomes, expected, strict=True):
            assert isinstance(outcome, Prediction)
            found = [dict(outcome.top)[label] for label in trained.spec.label_names]
            np.testing.assert_allclose(found, row, atol=1e-4)
    assert cli.main(["predict", str(out), *map(str, files), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in printed["predictions"]] == [
        trained.spec.label_names[int(row.argmax())] for row in expected
    ]
