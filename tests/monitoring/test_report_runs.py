"""What is read of run directories, what is refused, and the runs that tests of the page share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_runs import load_runs
from cmkd_scale.stages import student, teacher

MINUS, NONE = "\u2212", "\u2013"
NAMES = ("cat", "dog", "owl")


def make_memory(file: Path, names: Sequence[str] = NAMES) -> Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "prototypes": rng.normal(size=(2 * len(names), 4)).astype(np.float32),
        "prototype_class": np.repeat(np.arange(len(names)), 2),
        "class_count": np.arange(len(names)) + 2,
    }
    save_file(tensors, file, metadata={"class_names": json.dumps(names)})
    return file


def make_predictions(run: Path, names: Sequence[str] = NAMES, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    labels = np.arange(30) % len(names)
    tensors = {
        "labels": labels,
        "predictions": np.where(rng.random(30) < 0.7, labels, (labels + 1) % len(names)),
        "features": rng.normal(size=(30, 4)).astype(np.float32),
    }
    metadata = {"label_names": json.dumps(names)}
    save_file(tensors, run / "predictions.safetensors", metadata=metadata)


def make_run(
    run: Path, method: str = "ce_ls", seed: int = 0, accuracy: float = 0.5, **more: Any
) -> Path:
    """A finished run; ``more`` replaces keys of its results."""
    run.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as file:
        for step in (1, 10, 20):
            record = {"step": step, "loss": 3.0 / step, "loss/smoothed_cross_entropy": 2.0 / step}
            file.write(json.dumps(record) + "\n")
    results = {
        "stage": "student",
        "method": method,
        "seed": seed,
        "steps": 20,
        "metrics": {
            "test/accuracy": accuracy,
            "test/cross_entropy": 2.0 - accuracy,
            "test/per_class_accuracy": dict.fromkeys(NAMES, accuracy),
        },
        "config_digest": "0123456789abcdef",
        "wall_seconds": 30 + seed,
        "finished": "2026-06-20T10:00:00Z",
        "versions": {"torch": "2.13.0"},
    }
    (run / "results.json").write_text(json.dumps(results | more))
    return run


def make_bare_run(run: Path, **more: Any) -> Path:
    """A run without what curves and accuracies are drawn from, for tests of the rest."""
    make_run(run, metrics={}, **more)
    (run / "metrics.jsonl").unlink()
    return run


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, text, tables; pictures apart."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.drawn: list[str] = []
        """Tags within pictures."""
        self.labels: list[str] = []
        """Text within pictures."""
        self.pictures = 0
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self._within_svg = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "svg":
            self._within_svg, self.pictures = True, self.pictures + 1
        if self._within_svg:
            self.drawn.append(tag)
            self.drawn += [f"{tag}.{name}" for name, _ in attrs]
            return
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "svg":
            self._within_svg = False

    def handle_data(self, data: str) -> None:
        if self._within_svg:
            self.labels.append(data)
            return
        self.text.append(data)
        inside = next(
            (tag for tag in reversed(self.tags) if tag not in ("code", "meta", "span", "progress")),
            "",
        )
        if inside in ("h1", "h2") and data.strip():
            self.headings.append(data.strip().replace("\u00a0", " "))
        if inside in ("td", "th") and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()

    def row(self, *begins: str) -> list[str]:
        [row] = [row for row in self.rows if row[: len(begins)] == list(begins)]
        return row


def refuse(file: Path, content: str, tmp_path: Path) -> None:
    file.write_text(content)
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        write_report([file.parent], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{torn",
        "[]",
        "null",
        "[" * 99999,
        '"\\ud800',
        "1" * 5000,
        '{"metrics": []}',
        '{"metrics": {"test/accuracy": "high"}}',
        '{"metrics": {"test/accuracy": true}}',
        '{"metrics": {}, "seed": "0"}',
        '{"metrics": {}, "method": 1}',
        '{"metrics": {}, "versions": []}',
    ],
)
def test_malformed_results_are_refused_by_name(tmp_path: Path, content: str) -> None:
    refuse(make_run(tmp_path / "run") / "results.json", content, tmp_path)


@pytest.mark.parametrize("content", ["a: [", "- 1", "run: {}", "method: {name: x}\nrun: {seed: x}"])
def test_a_malformed_config_is_refused_by_name(tmp_path: Path, content: str) -> None:
    refuse(make_run(tmp_path / "run") / "config.yaml", content, tmp_path)


def test_malformed_metrics_and_environment_are_refused_by_name(tmp_path: Path) -> None:
    refuse(make_run(tmp_path / "a") / "metrics.jsonl", '{"step": 1}\n{\n{"step": 2}\n', tmp_path)
    refuse(make_run(tmp_path / "b") / "env.json", "{", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.array([0, 3])},
        {"labels": np.array([0])},
        {"predictions": np.array([0, -1])},
        {"predictions": np.array([[0, 1]])},
        {"features": np.zeros(2, np.float32)},
    ],
)
def test_predictions_that_contradict_themselves_are_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    run = make_bare_run(tmp_path / "run")
    tensors: dict[str, Any] = {
        "labels": np.array([0, 1]),
        "predictions": np.array([0, 1]),
        "features": np.zeros((2, 2), np.float32),
    }
    file = run / "predictions.safetensors"
    save_file(tensors | change, file, metadata={"label_names": json.dumps(NAMES)})
    with pytest.raises(IntegrityError, match=re.escape(str(file))):
        write_report([run], tmp_path / "report.html")


def test_torn_tensor_files_are_refused_by_name(tmp_path: Path) -> None:
    memory = make_memory(tmp_path / "memory.safetensors")
    run = make_bare_run(tmp_path / "run", memory_file=str(memory))
    make_predictions(run)
    for file in (memory, run / "predictions.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(IntegrityError, match=re.escape(str(file))):
            write_report([run], tmp_path / "report.html")


def test_nothing_readable_is_a_usage_error_that_names_runs_below(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(UsageError, match="at least one"):
        write_report([], out)
    with pytest.raises(UsageError, match="no run directory"):
        write_report([tmp_path / "missing"], out)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="nothing to report; let its stage"):
        write_report([empty], out)
    (empty / "results.json").write_text('{"summary": {}}')
    run = make_run(empty / "ce_ls" / "0")
    with pytest.raises(UsageError, match=re.escape(f"the runs {run}: give those")):
        write_report([empty], out)


def test_an_output_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=re.escape("pip install 'cmkd_scale[report]'")):
        write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize(
    "content",
    [
        '{"metrics": {"test/per_class_accuracy": {"cat": "high"}}}',
        '{"metrics": {"test/skipped": "1"}}',
        '{"metrics": {}, "restarts": {"resume": "1"}}',
        '{"metrics": {}, "memory_files": [1]}',
    ],
)
def test_malformed_parts_of_results_are_refused_by_name(tmp_path: Path, content: str) -> None:
    refuse(make_run(tmp_path / "run") / "results.json", content, tmp_path)


def test_a_config_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    refuse(make_run(tmp_path / "run") / "config.yaml", "a: &a [1]\nb: [*a, *a]\n", tmp_path)


@pytest.mark.parametrize(
    ("stage", "usual"), [("teacher", teacher.DEFAULT_METHOD), ("student", student.DEFAULT_METHOD)]
)
def test_a_method_that_is_unset_is_the_usual_one(tmp_path: Path, stage: str, usual: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "results.json").unlink()
    (run / "env.json").write_text(json.dumps({"stage": stage, "world_size": 4}))
    (run / "config.yaml").write_text("run: {seed: 1}\nmethod: {name: null, control: none}\n")
    [loaded] = load_runs([run])
    assert (loaded.method, loaded.ranks) == (usual, 4)


def test_backbones_stand_in_the_provenance(tmp_path: Path) -> None:
    small, large = make_run(tmp_path / "small"), make_run(tmp_path / "large", seed=1)
    rest = "run: {seed: 1}\nmethod: {name: ce_ls}\n"
    options = "model: {backbone: someone/vit-large, tuning: lora}\n"
    (large / "config.yaml").write_text(rest + options)
    family = make_run(tmp_path / "family", seed=2)
    options = "model: {backbone_config: {model_type: resnet}, tuning: full}\n"
    (family / "config.yaml").write_text(rest + options)
    runs = load_runs([small, large, family])
    assert [run.backbone for run in runs] == ["", "someone/vit-large, lora", "resnet, full"]
    write_report([small, large], tmp_path / "both.html")
    rows = Page(tmp_path / "both.html").rows
    assert "backbone" in next(row for row in rows if "method" in row and "memory" in row)
    assert any("someone/vit-large, lora" in row for row in rows)
    write_report([small], tmp_path / "one.html")
    assert not any("backbone" in row for row in Page(tmp_path / "one.html").rows)
