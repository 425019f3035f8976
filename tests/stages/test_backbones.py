"""Runs whose models are backbones of ``transformers``, whole or in part trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmkd_scale.config import Config, make_config
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.models.pretrained import pretrained_config
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.common import ModelSpec, load_trained, make_spec
from cmkd_scale.stages.evaluate import evaluate
from cmkd_scale.stages.streams import open_split
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tests.conftest import Launch
from tests.data.senses import build_senses
from tests.models.backbones import save_backbone
from tests.training.test_backends import environment


@dataclass(frozen=True)
class Hub:
    """Shards of ``senses`` and small backbones, with a memory that a ViT has left."""

    root: Path

    def config(self, run: Path, modality: str, **sections: dict[str, Any]) -> Config:
        return make_config(self.tree(run, modality, **sections))

    def tree(self, run: Path, modality: str, **sections: dict[str, Any]) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "run": {"dir": str(run)},
            "data": {"shards": str(self.root / modality)},
            "model": {"feature_dim": 8},
            "method": {"guard": False},
            "train": {
                "steps": 6,
                "global_batch_size": 6,
                "warmup_steps": 1,
                "log_every_steps": 1,
                "checkpoint_every_steps": 3,
            },
        }
        for name, section in sections.items():
            tree[name] = {**tree.get(name, {}), **section}
        return tree

    def model(self, name: str, **more: Any) -> dict[str, Any]:
        return {"backbone": str(self.root / name), **more}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    made = Hub(tmp_path_factory.mktemp("hub"))
    for modality in ("image", "audio", "text"):
        build_senses(made.root / modality, modality)
    for name in ("vit", "resnet", "wav2vec2", "modernbert"):
        save_backbone(name, made.root / name)
    teacher(made.config(made.root / "t", "image", model=made.model("vit")), console=False)
    run = {"run": {"dir": str(made.root / "m")}, "teacher": {"run": str(made.root / "t")}}
    memory(make_config(run))
    return made


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


def test_a_run_keeps_what_it_needs_of_the_backbone_but_its_weights(hub: Hub) -> None:
    kept = {file.name for file in (hub.root / "t" / "backbone").iterdir()}
    assert kept == {"config.json", "preprocessor_config.json"}
    trained = load_trained(hub.root / "t", "teacher")
    spec = trained.spec.backbone
    assert spec is not None
    assert spec.source == str(hub.root / "vit")
    assert spec.weights_digest is not None
    assert trained.processor is not None


def test_a_trained_run_needs_its_backbone_no_more(hub: Hub, tmp_path: Path) -> None:
    for part in ("vit", "image"):
        shutil.copytree(hub.root / part, tmp_path / part)
    own = Hub(tmp_path)
    result = teacher(own.config(tmp_path / "t", "image", model=own.model("vit")), console=False)
    shutil.rmtree(tmp_path / "vit")
    run = {"run": {"dir": str(tmp_path / "m")}, "teacher": {"run": str(tmp_path / "t")}}
    memory(make_config(run))
    again = evaluate(own.config(tmp_path / "t", "image", model=own.model("vit")))
    assert again["metrics"]["test/accuracy"] == result["metrics"]["test/accuracy"]


def test_a_processor_that_was_changed_is_found(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(hub.root / "t", tmp_path / "t")
    file = tmp_path / "t" / "backbone" / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(IntegrityError, match="not those that the model was trained with"):
        load_trained(tmp_path / "t", "teacher")


@pytest.mark.parametrize(
    ("name", "modality", "tuning"),
    [("wav2vec2", "audio", "lora"), ("resnet", "image", "frozen"), ("modernbert", "text", "full")],
)
def test_what_is_trained_moves_and_nothing_else(
    name: str, modality: str, tuning: str, hub: Hub, tmp_path: Path
) -> None:
    config = hub.config(
        tmp_path / "s",
        modality,
        model=hub.model(name, tuning=tuning, lora_rank=2),
        memory={"run": str(hub.root / "m")},
    )
    student(config, console=False)
    start = load_file(hub.root / name / "model.safetensors")
    prefix = "model.encoder.backbone."
    moved: set[str] = set()
    kept: set[str] = set()
    for key, value in weights(tmp_path / "s").items():
        plain = key.removeprefix(prefix).replace("base_model.model.", "")
        plain = plain.replace(".base_layer", "")
        if key.startswith(prefix) and plain in start:
            (kept if torch.equal(value, start[plain]) else moved).add(plain)
    assert len(kept) + len(moved) > 10
    if tuning == "full":
        assert len(moved) > len(kept)
    else:
        assert moved == set()


def test_a_run_goes_on_as_if_it_had_not_stopped(hub: Hub, tmp_path: Path) -> None:
    def config(run: Path) -> Config:
        model = hub.model("wav2vec2", tuning="lora", lora_rank=2)
        return hub.config(run, "audio", model=model, memory={"run": str(hub.root / "m")})

    student(config(tmp_path / "whole"), console=False)
    student(config(tmp_path / "cut"), console=False)
    for later in (tmp_path / "cut" / "checkpoints").glob("step_*6"):
        shutil.rmtree(later)
    (tmp_path / "cut" / "results.json").unlink()
    student(config(tmp_path / "cut"), console=False)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_model_without_backbone_is_described_as_before_there_were_any(
    hub: Hub, tmp_path: Path
) -> None:
    """What a checkpoint says of its model decides whether a run goes on from it."""
    config = hub.config(tmp_path, "image")
    spec = make_spec(config, open_split(config, "train"), 8)
    names = "modality transform encoder shape width depth feature_dim label_names"
    assert set(spec.to_json()) == set(names.split())
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_a_run_goes_on_under_a_library_with_more_options(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hub.config(tmp_path / "t", "image", model=hub.model("vit"))
    teacher(config, console=False)
    before = weights(tmp_path / "t")
    for later in (tmp_path / "t" / "checkpoints").glob("step_*6"):
        shutil.rmtree(later)
    monkeypatch.setattr(
        "cmkd_scale.stages.backbones.pretrained_config",
        lambda *given: {**pretrained_config(*given), "newer": 1},
    )
    teacher(config, console=False)
    after = weights(tmp_path / "t")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    spec = load_trained(tmp_path / "t", "teacher").spec.backbone
    assert spec is not None
    assert "newer" not in spec.config


def test_a_refused_start_leaves_the_run_as_it_was(hub: Hub, tmp_path: Path) -> None:
    """The backbone's directory has changed since the run was begun."""
    shutil.copytree(hub.root / "vit", tmp_path / "vit")
    config = hub.config(tmp_path / "t", "image", model={"backbone": str(tmp_path / "vit")})
    teacher(config, console=False)
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(IntegrityError, match="another model"):
        teacher(config, console=False)
    assert load_trained(tmp_path / "t", "teacher").processor is not None


def test_options_that_do_not_go_together_are_refused(hub: Hub, tmp_path: Path) -> None:
    def refused(match: str, modality: str = "image", **sections: dict[str, Any]) -> None:
        run = tmp_path / match[:8]
        with pytest.raises(UsageError, match=match):
            teacher(hub.config(run, modality, **sections), console=False)

    refused(
        "options of the small encoders: leave out model.width", model=hub.model("vit", width=32)
    )
    refused("reads image, and the shards hold text", "text", model=hub.model("vit"))
    refused(
        "n_mels is not an option.*with its own",
        "audio",
        model=hub.model("wav2vec2"),
        data={"transform": {"n_mels": 40}},
    )
    refused(
        "keeps a backbone's weights",
        model={"backbone_config": {"model_type": "vit"}, "tuning": "frozen"},
    )
    other = shutil.copytree(hub.root / "modernbert", tmp_path / "other") / "config.json"
    other.write_text(other.read_text().replace('"vocab_size": 64', '"vocab_size": 20'))
    refused(
        "has 62 tokens, and the backbone's vocab_size is 20",
        "text",
        model={"backbone": str(other.parent)},
    )
    refused("nothing/here is no directory", model={"backbone": "nothing/here"})


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("backend", "name", "modality", "tuning"),
    [
        ("ddp", "wav2vec2", "audio", "lora"),
        ("fsdp2", "vit", "image", "lora"),
        ("zero2", "resnet", "image", "frozen"),
        ("zero3", "modernbert", "text", "lora"),
    ],
)
def test_any_backend_trains_a_part_of_a_backbone(
    backend: str,
    name: str,
    modality: str,
    tuning: str,
    hub: Hub,
    tmp_path: Path,
    launch: Launch,
) -> None:
    """Losses and weights of two processes are those of one."""

    def config(run: Path) -> dict[str, Any]:
        return hub.tree(
            run,
            modality,
            model=hub.model(name, tuning=tuning, lora_rank=2),
            memory={"run": str(hub.root / "m")},
        )

    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config(tmp_path / "two")))
    student(make_config(config(tmp_path / "one")), console=False)
    launch(
        *("student", "--config", file),
        processes=2,
        env={**environment(backend, tmp_path), "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    ours, theirs = weights(two), weights(one)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=2e-3, msg=key)


def test_a_start_that_was_refused_claims_no_directory(hub: Hub, tmp_path: Path) -> None:
    def start(**model: Any) -> None:
        teacher(hub.config(tmp_path, "image", model=hub.model("vit", **model)), console=False)

    with pytest.raises(UsageError, match="no layer to adapt"):
        start(tuning="lora", lora_targets=["none"])
    start()  # another configuration
    with pytest.raises(UsageError, match="holds a run with another configuration"):
        start(pooling="mean")
