"""The page against its inputs: numbers, sections, escaping, self-containedness, refusals."""

from __future__ import annotations

import base64
import json
import re
import statistics
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_runs import group_runs, load_runs
from cmkd_scale.monitoring.report_verdict import verdict

MINUS, NONE = "\u2212", "\u2013"
NAMES = ("cat", "dog", "owl")
ACCURACY = {
    "ce_ls": [0.394, 0.424, 0.437],
    "ucmkd_global": [0.671, 0.694, 0.734],
    "ucmkd_global/permuted": [0.230, 0.228, 0.216],
}


def make_memory(file: Path, names: Sequence[str] = NAMES) -> Path:
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        "prototypes": rng.normal(size=(2 * len(names), 4)).astype(np.float32),
        "prototype_class": np.repeat(np.arange(len(names)), 2),
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
    """What a browser would make of a page: tags, attributes, text, tables."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        inside = next((tag for tag in reversed(self.tags) if tag not in ("code", "meta")), "")
        if inside in ("h1", "h2") and data.strip():
            self.headings.append(data.strip().replace("\u00a0", " "))
        if inside in ("td", "th") and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()

    def row(self, *begins: str) -> list[str]:
        [row] = [row for row in self.rows if row[: len(begins)] == list(begins)]
        return row


def report(runs: Sequence[Path], out: Path) -> Page:
    return Page(write_report(runs, out)[0])


@pytest.fixture(scope="module")
def nine_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    memory = make_memory(root / "memory.safetensors")
    runs = []
    for method, accuracies in ACCURACY.items():
        for seed, accuracy in enumerate(accuracies):
            run = root / f"{method.replace('/', '-')}-{seed}"
            runs.append(make_run(run, method, seed, accuracy, memory_file=str(memory)))
            make_predictions(run, seed=seed)
    return runs


@pytest.fixture(scope="module")
def nine_files(nine_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report(nine_runs, tmp_path_factory.mktemp("report") / "out" / "report.html")


def test_the_table_holds_the_statistics_of_the_inputs(nine_files: list[Path]) -> None:
    page = Page(nine_files[0])
    control = statistics.fmean(ACCURACY["ce_ls"])
    for method, accuracies in ACCURACY.items():
        mean = float(np.mean(accuracies))
        gain = f"{100 * (mean - control):+.1f} points".replace("-", MINUS)
        assert page.row(method) == [
            method,
            f"{100 * mean:.1f}",
            f"{100 * np.std(accuracies, ddof=1):.1f}",
            NONE if method == "ce_ls" else gain,
            f"{2 - mean:.3f}",
            "0, 1, 2",
            "31 s",
        ]
    methods = [row[0] for row in page.rows if row[0] in ACCURACY]
    assert methods == ["ucmkd_global", "ce_ls", "ucmkd_global/permuted"]


def test_the_verdict_names_best_control_and_permuted_teacher(nine_files: list[Path]) -> None:
    assert Page(nine_files[0]).headings[0] == (
        "Over 3 seeds, ucmkd_global reaches 70.0% ± 3.2, 1.67 times the control ce_ls with 41.8% "
        "± 2.2, ahead in 3 of 3 seeds; with a class-permuted teacher it reaches 22.5% ± 0.8."
    )


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([("ce_ls", 0, 0.5)], "ce_ls reaches a test accuracy of 50.0% (seed 0); chance is 33.3%."),
        (
            [("ce_ls", 0, 0.5), ("ucmkd_global", 0, 0.4)],
            "No method beats the control: ce_ls reaches 50.0% (seed 0), the best method "
            "ucmkd_global 40.0% (seed 0).",
        ),
        (
            [("ucmkd_global", 0, 0.4), ("ucmkd_global", 1, 0.6), ("kd_memory", 0, 0.3)],
            "ucmkd_global reaches a test accuracy of 50.0% ± 14.1 (2 seeds); there is no control "
            "without a teacher to compare with.",
        ),
        (
            [("ce", 0, 0.2), ("kd_memory", 0, 0.3), ("kd_memory", 1, 0.3)],
            "kd_memory reaches 30.0% ± 0.0 (2 seeds), 1.50 times the control ce with 20.0% "
            "(seed 0), ahead in 1 of 1 seeds.",
        ),
        (
            [("ce", 0, 0.2), ("ce_ls", 0, 0.3)],
            "ce_ls reaches a test accuracy of 30.0% (seed 0); there is no method with a teacher "
            "to compare with.",
        ),
    ],
)
def test_the_verdict_says_no_more_than_the_runs(
    tmp_path: Path, runs: list[tuple[str, int, float]], sentence: str
) -> None:
    made = [make_run(tmp_path / f"{n}", *run) for n, run in enumerate(runs)]
    assert verdict(group_runs(load_runs(made))).replace("\u00a0", " ") == sentence


def test_all_sections_are_there_and_pictures_are_the_files_beside_the_page(
    nine_files: list[Path],
) -> None:
    files, plots = nine_files, nine_files[0].parent / "plots"
    names = ["accuracy", "learning_curves", "confusion", "prototype_map"]
    assert files[1:] == [plots / f"{name}.png" for name in names]
    page = Page(files[0])
    embedded = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    prefix = "data:image/png;base64,"
    assert all(uri.startswith(prefix) for uri in embedded)
    decoded = [base64.b64decode(uri.removeprefix(prefix)) for uri in embedded]
    assert decoded == [file.read_bytes() for file in files[1:]]
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") for png in decoded)
    assert page.headings[1:] == [
        "Methods",
        "Accuracy by method",
        "Learning curves",
        "Confusions of ucmkd_global",
        "Hardest pairs of ucmkd_global",
        "The teacher's prototypes and the student's features",
        "Provenance",
    ]


def test_the_page_asks_nothing_of_any_server(nine_files: list[Path]) -> None:
    page = Page(nine_files[0])
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name in ("href", "srcset", "style")]
    style = re.findall(r"<style>(.*?)</style>", nine_files[0].read_text(), re.DOTALL)[0]
    assert not re.search(r"url\(|@import|https?:", style)


def test_the_order_of_the_runs_does_not_change_a_byte(
    nine_runs: list[Path], nine_files: list[Path], tmp_path: Path
) -> None:
    again = write_report(nine_runs[::-1], tmp_path / "report.html")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in nine_files]


def test_the_hardest_pair_is_that_of_the_predictions(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "run")
    tensors = {
        "labels": np.array([0, 0, 0, 0, 1, 2, -1]),
        "predictions": np.array([1, 1, 1, 0, 1, 0, 2]),
        "features": np.zeros((7, 2), np.float32),
    }
    metadata = {"label_names": json.dumps(NAMES)}
    save_file(tensors, run / "predictions.safetensors", metadata=metadata)
    page = report([run], tmp_path / "report.html")
    assert page.row("cat", "dog") == ["cat", "dog", "3", "75.0"]
    assert page.row("owl", "cat") == ["owl", "cat", "1", "100.0"]


def test_a_run_still_training_shows_its_curves_and_takes_its_name_from_the_config(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    (run / "results.json").unlink()
    (run / "config.yaml").write_text(
        "run: {seed: 7}\nmethod: {name: ucmkd_global, control: permuted}\n"
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": null}\n{"step": 40, "lo')
    page = report([run], tmp_path / "report.html")
    assert page.headings == [
        "No test result yet; the last logged step is 30.",
        "Methods",
        "Learning curves",
        "Provenance",
    ]
    row = page.row("run", NONE)
    assert row[2:5] == ["ucmkd_global/permuted", "7", "30"]
    assert row[-1] == "not yet"


def test_only_results_leaves_out_what_needs_more(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    page = report([run], tmp_path / "report.html")
    assert page.headings[1:] == ["Methods", "Accuracy by method", "Provenance"]


def test_a_teacher_is_listed_but_not_compared(tmp_path: Path) -> None:
    teacher = make_run(tmp_path / "t", "ce_ls", 0, 0.99, stage="teacher")
    student = make_run(tmp_path / "s", "ucmkd_global", 0, 0.6)
    page = report([teacher, student], tmp_path / "report.html")
    assert page.headings[0].startswith("ucmkd_global reaches a test accuracy of 60.0%")
    assert page.row("teacher", "99.0")[3] == NONE
    alone = report([teacher], tmp_path / "alone.html")
    assert alone.headings[0].startswith("teacher reaches a test accuracy of 99.0%")


def test_a_run_named_twice_counts_once_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", "ce_ls", 0, 0.4)
    second = make_run(tmp_path / "b" / "run", "ce_ls", 1, 0.6)
    page = report([first, second, first / ".." / "run"], tmp_path / "report.html")
    assert page.row("ce_ls")[1] == "50.0"
    assert [row[0] for row in page.rows[-2:]] == ["a/run", "b/run"]


def test_a_memory_file_is_found_from_the_run(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "run", memory_file="../memory.safetensors")
    make_predictions(run)
    make_memory(tmp_path / "memory.safetensors")
    files = write_report([run], tmp_path / "report.html")
    assert [file.stem for file in files[1:]] == ["confusion", "prototype_map"]
    (tmp_path / "memory.safetensors").unlink()
    files = write_report([run], tmp_path / "report.html")
    assert [file.stem for file in files[1:]] == ["confusion"]


@pytest.mark.parametrize("classes", [1, 26, 300])
def test_any_number_of_classes_can_be_drawn(tmp_path: Path, classes: int) -> None:
    names = [chr(0x61 + i % 26) + f"{i:03}" for i in range(classes)]
    memory = make_memory(tmp_path / "memory.safetensors", names)
    run = make_bare_run(tmp_path / "run", memory_file=str(memory))
    make_predictions(run, names)
    files = write_report([run], tmp_path / "report.html")
    # One class has two prototypes: no plane, so no map.
    drawn = ["confusion", "prototype_map"]
    assert [file.stem for file in files[1:]] == (drawn[:1] if classes == 1 else drawn)


ODD = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["<b>", "</td>", "$x_", "_a", "{{ 7*7 }}", "{% raw %}", "&amp;", "\ud800", "a\0", "'\"", "-->"]
)
FILE_NAME = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)
NUMBER = count()


def named_page(root: Path, method: str, folder: str, classes: Sequence[str]) -> Page:
    """The page of a run with these names; without pictures unless there are classes."""
    root = root / f"{next(NUMBER)}"
    root.mkdir()
    more: dict[str, Any] = {"config_digest": method, "versions": {method: method}}
    if classes:
        memory = make_memory(root / "memory.safetensors", classes)
        run = make_run(root / folder, method, memory_file=str(memory), **more)
        make_predictions(run, classes)
    else:
        run = make_bare_run(root / folder, method=method, **more)
    return report([run], root / "report.html")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Page]:
    """Pages of harmless names, without and with classes."""
    root = tmp_path_factory.mktemp("harmless")
    method, folder = "kd_memory", "run"
    return named_page(root, method, folder, ()), named_page(root, method, folder, NAMES)


def check_same_but_for_text(page: Page, reference: Page) -> None:
    assert page.tags == reference.tags
    assert [a[:2] for a in page.attributes] == [a[:2] for a in reference.attributes]


@settings(max_examples=30, deadline=None)
@given(method=ODD, folder=FILE_NAME)
def test_odd_names_of_runs_and_methods_change_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory,
    harmless: tuple[Page, Page],
    method: str,
    folder: str,
) -> None:
    page = named_page(tmp_path_factory.getbasetemp(), method, folder, ())
    check_same_but_for_text(page, harmless[0])
    text = "".join(page.text)
    assert all(name in text for name in (method, folder) if name.isprintable())


@settings(max_examples=2, deadline=None)
@given(classes=st.lists(ODD, min_size=3, max_size=3, unique=True))
@example(classes=["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$\\frac{1}$ 猫"])
def test_odd_names_of_classes_change_the_text_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, harmless: tuple[Page, Page], classes: list[str]
) -> None:
    root = tmp_path_factory.getbasetemp()
    page = named_page(root, "</style><script>alert(3)</script>", "<svg onload=alert(4)>", classes)
    check_same_but_for_text(page, harmless[1])
    listed = {cell for row in page.rows if len(row) == 4 for cell in row[:2]}
    shown = {name.strip() for name in classes if name.isprintable() and name.strip()}
    assert shown <= listed


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
