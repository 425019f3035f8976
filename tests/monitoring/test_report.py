"""The page against its inputs: numbers, sections, self-containedness."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_runs import group_runs, load_runs
from cmkd_scale.monitoring.report_verdict import verdict
from tests.monitoring.test_report_runs import (
    MINUS,
    NAMES,
    NONE,
    Page,
    make_bare_run,
    make_memory,
    make_predictions,
    make_run,
)

ACCURACY = {
    "ce_ls": [0.394, 0.424, 0.437],
    "ucmkd_global": [0.671, 0.694, 0.734],
    "ucmkd_global/permuted": [0.230, 0.228, 0.216],
}


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
    names = ["accuracy", "learning_curves", "gains", "confusion", "prototype_map"]
    assert files[1:] == [plots / f"{name}.png" for name in names]
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files[1:])
    page = Page(files[0])
    assert page.pictures == len(names)
    said = [value for _, name, value in page.attributes if name == "aria-label"]
    assert said[0].startswith("Test accuracy by method: ucmkd_global 70.0%")
    assert {"ucmkd_global/permuted", "cat", "dog", "optimiser step"} <= set(page.labels)
    assert page.headings[1:] == [
        "Methods",
        "Accuracy by method",
        "Learning curves",
        "Which classes the teacher helps",
        "Confusions of ucmkd_global",
        "Hardest pairs of ucmkd_global",
        "The teacher's prototypes and the student's features",
        "Data and label shift",
        "Faults survived",
        "Provenance",
    ]


def test_the_page_asks_nothing_of_any_server(nine_files: list[Path]) -> None:
    html = nine_files[0].read_text()
    page = Page(nine_files[0])
    assert not {"script", "link", "iframe", "object", "base", "form", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name in ("href", "src", "srcset")]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in page.attributes
    # Within pictures: names of the page itself, and the heat map as data.
    assert set(re.findall(r'href="(#|data:image/png;base64,|.*?")', html)) == {
        "#",
        "data:image/png;base64,",
    }
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert not re.search(r"@import|https?:|//\w", html)


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
        "Under way",
        "Methods",
        "Learning curves",
        "Faults survived",
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
