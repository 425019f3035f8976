from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from cmkd_scale.cli import main
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import file_digest, read_json, to_json
from cmkd_scale.operations import export as exporting
from cmkd_scale.operations.export import export
from cmkd_scale.operations.exported import load_exported
from cmkd_scale.stages.student import student
from tests.operations.export_runs import SPECS, STEPS, make_run, make_spec, probe
from tests.stages.conftest import Story


@pytest.fixture(scope="module")
def taught(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's finished run."""
    run = tmp_path_factory.mktemp("taught") / "student"
    student(story.config(run, method={"guard": True, "guard_steps": 4}), console=False)
    return run


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", SPECS)
def test_what_is_exported_is_the_model(tmp_path: Path, name: str) -> None:
    model = make_run(tmp_path / "run", name)
    result = export(tmp_path / "run", format="safetensors")
    assert result["directory"] == str(tmp_path / "run" / "export")
    exported = load_exported(tmp_path / "run" / "export")
    assert exported.spec == make_spec(name)
    inputs = probe(exported.spec, 4)
    with torch.no_grad():
        ours, theirs = model(inputs), exported.model(inputs)
    assert torch.equal(ours.features, theirs.features)
    assert torch.equal(ours.logits, theirs.logits)
    assert exported.modality.shape == exported.spec.shape
    assert not exported.model.training


def test_averaged_weights_are_exported_where_there_are_any(tmp_path: Path) -> None:
    model = make_run(
        tmp_path / "run", average=True, config={"train": {"steps": 5, "ema_decay": 0.9}}
    )
    export(tmp_path / "run", format="safetensors", out=tmp_path / "out")
    exported = load_exported(tmp_path / "out")
    assert torch.equal(exported.model.head.weight, model.head.weight)
    assert exported.provenance["averaged_weights"] is True


def test_the_directory_of_a_trained_student(taught: Path, tmp_path: Path) -> None:
    result = export(taught, format="safetensors", out=tmp_path / "out")
    described = read_json(tmp_path / "out" / "cmkd.json")
    expected = ["README.md", "cmkd.json", "config.json", "head.safetensors", "model.safetensors"]
    assert names(tmp_path / "out") == sorted(result["files"]) == expected
    assert described["files"] == {
        name: file_digest(tmp_path / "out" / name) for name in expected if name != "cmkd.json"
    }
    results, facts = read_json(taught / "results.json"), described["provenance"]
    bound = results["metrics"].pop("bound")
    assert facts["metrics"] == results["metrics"]
    assert facts["bound"][0]["risk"] == bound[0]["risk"]
    assert facts["guard"] == results["guard"]
    assert facts["memory_digest"] == results["memory_digest"]
    assert facts["teachers"][0]["modality"] == "text"
    assert facts["data"]["samples"] == 60
    assert facts["data"]["name"] == "toy-text-train"
    # Nothing of this machine is passed on.
    for name in ("cmkd.json", "README.md"):
        assert str(tmp_path.parents[1]) not in (tmp_path / "out" / name).read_text()


def test_results_of_other_steps_or_data_are_not_the_models(taught: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    results = read_json(run / "results.json")
    (run / "results.json").write_bytes(to_json({**results, "steps": 11}))
    (run / "evaluation.json").write_bytes(to_json({**results, "config_digest": "other"}))
    export(run, format="safetensors", out=tmp_path / "out")
    facts = load_exported(tmp_path / "out").provenance
    assert (facts["metrics"], facts["measured"], facts["bound"]) == ({}, None, [])


def test_a_newer_evaluation_replaces_the_results(taught: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    results = read_json(run / "results.json")
    newer = {
        **{key: value for key, value in results.items() if key != "guard"},
        "finished": "2999-01-01T00:00:00Z",
        "split": "validation",
        "metrics": {"test/accuracy": 0.125},
    }
    (run / "evaluation.json").write_bytes(to_json(newer))
    export(run, format="safetensors", out=tmp_path / "out")
    facts = load_exported(tmp_path / "out").provenance
    assert facts["metrics"] == {"test/accuracy": 0.125}
    assert facts["measured"]["split"] == "validation"
    assert facts["guard"] == results["guard"]


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "one", "features")
    make_run(tmp_path / "two")
    out = tmp_path / "out"
    out.mkdir()  # empty: fine
    export(tmp_path / "one", format="safetensors", out=out)
    export(tmp_path / "two", format="safetensors", out=out)
    assert load_exported(out).spec.modality == "text"
    assert names(tmp_path) == ["one", "out", "two"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "one", "features")
    make_run(tmp_path / "two")
    out = tmp_path / "out"
    export(tmp_path / "one", format="safetensors", out=out)

    def full(*arguments: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_card", full)
    for target in (out, tmp_path / "other"):
        with pytest.raises(UsageError, match=r"cannot be written: .*No space left"):
            export(tmp_path / "two", format="safetensors", out=target)
    assert load_exported(out).spec.modality == "features"
    assert names(tmp_path) == ["one", "out", "two"]


def test_what_a_killed_export_left_is_cleared_or_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "one", "features")
    out = tmp_path / "out"
    export(tmp_path / "one", format="safetensors", out=out)
    # Killed between its two renames.
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.123.tmp").mkdir()
    make_run(tmp_path / "two")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(UsageError, match="Nothing was exported"):
        export(tmp_path / "two", format="safetensors", out=out)
    assert load_exported(out).spec.modality == "features"
    assert names(tmp_path) == ["one", "out", "two"]


def test_a_model_that_does_not_come_back_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")

    def changed(directory: Path) -> Any:
        exported = load_exported(directory)
        with torch.no_grad():
            exported.model.head.bias[1] += 3e-4
        return exported

    monkeypatch.setattr(exporting, "load_exported", changed)
    with pytest.raises(UsageError, match=r"differs from it by 0.0003.* Nothing was exported"):
        export(tmp_path / "run", format="safetensors", out=tmp_path / "out")
    assert names(tmp_path) == ["run"]


def run_of_a_memory(run: Path) -> None:
    make_run(run)
    (run / "env.json").write_bytes(to_json({"stage": "memory"}))


def without_checkpoints(run: Path) -> None:
    make_run(run)
    shutil.rmtree(run / "checkpoints")


def with_a_weight(value: float) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        make_run(run, weights={"head.bias": torch.tensor([0.0, value, 0.0])})

    return make


def export_itself(run: Path) -> None:
    make_run(run.with_name("origin"))
    export(run.with_name("origin"), format="safetensors", out=run)


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no directory": (lambda run: None, {}, "There is no run directory"),
    "no run": (lambda run: run.mkdir(), {}, "is no run: name"),
    "a memory": (run_of_a_memory, {}, "a run of `cmkd memory`"),
    "no checkpoint": (without_checkpoints, {}, "holds no trained model"),
    "unfinished": (lambda run: make_run(run, step=3), {}, "of step 3 of 5"),
    "not a number": (with_a_weight(float("nan")), {}, r"not finite \(head.bias\)"),
    "infinite": (with_a_weight(float("inf")), {}, r"not finite \(head.bias\)"),
    "an export": (export_itself, {}, "is an export already"),
    "unknown format": (make_run, {"format": "onxn"}, "did you mean 'onnx'"),
    "no repository": (make_run, {"push_to": "me/you/they"}, "write it as owner/name"),
    "no owner": (make_run, {"push_to": "model"}, "write it as owner/name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    prepare, options, message = REFUSED[case]
    prepare(tmp_path / "run")
    before = names(tmp_path)
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "run", **{"format": "safetensors", "out": tmp_path / "out", **options})
    assert names(tmp_path) == before


def test_a_newest_checkpoint_that_is_damaged_leaves_the_run_unfinished(tmp_path: Path) -> None:
    make_run(tmp_path / "run", step=3)
    make_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/step_00000005/model.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match="newest valid checkpoint is of step 3 of 5"):
        export(tmp_path / "run", format="safetensors")
    (tmp_path / "run/checkpoints/step_00000003/COMPLETE").unlink()
    with pytest.raises(IntegrityError, match="No checkpoint in"):
        export(tmp_path / "run", format="safetensors")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("run/checkpoints", "among the run's checkpoints"),
        ("run/checkpoints/step_00000005/export", "among the run's checkpoints"),
        ("run", "holds what no export has written"),
        ("file", "is a file"),
        ("full", r"holds what no export has written \(mine.txt\)"),
        ("exported", r"holds what no export has written \(mine.txt\)"),
        ("file/below", "cannot be written"),
    ],
)
def test_nothing_else_is_overwritten(tmp_path: Path, out: str, message: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    export(tmp_path / "run", format="safetensors", out=tmp_path / "exported")
    for directory in ("full", "exported"):
        (tmp_path / directory / "mine.txt").write_text("mine")
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "run", format="safetensors", out=tmp_path / out)
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_files_are_as_readable_as_others_here(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    export(tmp_path / "run", format="safetensors", out=tmp_path / "out")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {usual}


def test_the_network_is_asked_only_when_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        export(tmp_path / "run", format="safetensors", push_to="me/model")
    assert not (tmp_path / "run" / "export").exists()


class Hub:
    """Takes the calls that would go to the Hub."""

    calls: list[tuple[str, dict[str, Any]]]
    refuses = False

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.refuses:
            raise RuntimeError("401 Unauthorized")
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> Any:
        options["names"] = names(Path(options["folder_path"]))
        self.calls.append(("upload", options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})


def test_a_push_makes_a_private_repository_and_uploads_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [], raising=False)
    make_run(tmp_path / "run")
    result = export(tmp_path / "run", format="safetensors", push_to="me/model")
    assert result["pushed"] == "https://hub/commit/1"
    (create, made), (upload, sent) = Hub.calls
    assert (create, upload) == ("create", "upload")
    assert made == {"repo_id": "me/model", "private": True, "exist_ok": True}
    assert sent["repo_id"] == "me/model"
    assert sent["names"] == names(tmp_path / "run" / "export")
    monkeypatch.setattr(Hub, "refuses", True)
    with pytest.raises(UsageError, match=r"cannot be uploaded to me/model \(401 Unauthorized\)"):
        export(tmp_path / "run", format="safetensors", push_to="me/model")
    assert load_exported(tmp_path / "run" / "export").spec.modality == "text"


def test_controls_are_named_beside_it_if_they_were_tested_alike(
    taught: Path, story: Story, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    shutil.copytree(taught, control)
    results = {**read_json(taught / "results.json"), "method": "ce_ls"}
    results["metrics"] = {"test/accuracy": 0.0625, "test/cross_entropy": 1.5}
    (control / "results.json").write_bytes(to_json(results))
    export(taught, format="safetensors", out=tmp_path / "out", controls=[control])
    (named,) = load_exported(tmp_path / "out").provenance["controls"]
    assert (named["method"], named["metrics"]["test/accuracy"]) == ("ce_ls", 0.0625)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| accuracy | 1.0000 | 0.0625 |" in card
    config = (control / "config.yaml").read_text()
    (control / "config.yaml").write_text(config.replace("test_split: test", "test_split: other"))
    with pytest.raises(UsageError, match=r"other samples .* data.test_split"):
        export(taught, format="safetensors", out=tmp_path / "out", controls=[control])
    (control / "results.json").unlink()
    with pytest.raises(UsageError, match="has no test result"):
        export(taught, format="safetensors", out=tmp_path / "out", controls=[control])


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["export", run, "--out", out, "--license", "mit", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["directory"], result["automodel"], result["steps"]) == (out, True, STEPS)
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlicense: mit\n")
    assert main(["export", run, "--out", out]) == 0
    assert f"exported to {out}\nce_ls after {STEPS} steps;" in capsys.readouterr().out
    assert main(["export", out]) == 2
    assert main(["export", str(tmp_path / "nothing")]) == 2
    (tmp_path / "run/checkpoints/step_00000005/state.json").write_text("{}")
    assert main(["export", run]) == 42
