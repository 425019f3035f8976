"""Streams and label shift, against counts and distances by hand."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.spatial.distance import cityblock

from cmkd_scale.data.labels import compare_labels
from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_data import read_labels, read_streams
from cmkd_scale.monitoring.report_runs import group_runs, load_runs
from tests.monitoring.test_report_runs import NAMES, Page, make_memory, make_run

REPORT = compare_labels("student (audio)", {"cat": 3, "dog": 1}, "memory", {"dog": 2, "owl": 5})


def evaluated(
    run: Path, method: str = "ce_ls", counts: tuple[int, ...] = (6, 3, 1), **more: Any
) -> Path:
    make_run(run, method, **more)
    labels = np.repeat(np.arange(len(counts)), counts)
    tensors = {
        "labels": np.append(labels, -1),
        "predictions": np.append(labels, 0),
        "features": np.zeros((len(labels) + 1, 2), np.float32),
    }
    metadata = {"label_names": json.dumps(NAMES)}
    save_file(tensors, run / "predictions.safetensors", metadata=metadata)
    return run


def test_streams_have_the_counts_and_distances_of_their_files(tmp_path: Path) -> None:
    memory = make_memory(tmp_path / "memory.safetensors")  # 2, 3 and 4 samples
    run = evaluated(tmp_path / "run", "coral", memory_files=[str(memory), "missing"])
    counts = {"cat": 5, "dog": 0, "emu": 5}
    (run / "labels.json").write_text(json.dumps({**REPORT.to_json(), "counts_here": counts}))
    training, known, test = read_streams(group_runs(load_runs([run])))
    share = np.array([6, 3, 1, 0]) / 10
    assert asdict(training) == {
        "what": "training",
        "users": ("coral",),
        "samples": 10,
        "classes": 2,
        "per_class": "5",
        "shift": pytest.approx(cityblock([0.5, 0, 0, 0.5], share) / 2),
    }
    assert known.what == f"memory {tmp_path.name}"
    assert (known.samples, known.per_class) == (9, "2 to 4, median 3")
    assert known.shift == pytest.approx(cityblock(np.array([2, 3, 4, 0]) / 9, share) / 2)
    assert (test.samples, test.classes, test.per_class, test.shift) == (
        10,
        3,
        "1 to 6, median 3",
        None,
    )


def test_training_without_counts_says_what_was_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(
        "run: {seed: 0}\nmethod: {name: ce_ls}\ndata: {n_per_class: 3}\n"
    )
    [training] = read_streams(group_runs(load_runs([run])))
    assert (training.samples, training.classes, training.per_class) == (None, None, "at most 3")


def test_what_methods_have_in_common_is_shown_once(tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / "a", "ce_ls"),
        evaluated(tmp_path / "b", "coral"),
        evaluated(tmp_path / "c", "mmd", counts=(1, 1, 1)),
    ]
    for run in runs[1:]:
        (run / "labels.json").write_text(json.dumps(REPORT.to_json()))
    groups = group_runs(load_runs(runs))
    assert [stream.users for stream in read_streams(groups)] == [("ce_ls", "coral"), ("mmd",)]
    [labels] = read_labels(groups)
    assert labels.users == ("coral", "mmd")
    assert (labels.shared, labels.only_here, labels.only_there) == (1, ("cat",), ("owl",))
    assert labels.strangers == [("student (audio)", "cat"), ("memory", "owl")]


def test_the_page_shows_streams_shift_and_classes_of_one_side(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", "coral")
    (run / "labels.json").write_text(json.dumps(REPORT.to_json()))
    page = Page(write_report([run], tmp_path / "report.html")[0])
    assert ["test", "10", "3", "1 to 6, median 3", "\u2013", "coral"] in page.rows
    assert [
        "student (audio)",
        "memory",
        "1",
        "1",
        "1",
        "0.000",
        "0.000",
        "1.0",
        "coral",
    ] in page.rows
    assert "Only in student (audio): cat." in page.text


@pytest.mark.parametrize(
    "change",
    [
        {"shared": 3},
        {"only_here": [1]},
        {"total_variation": "x"},
        {"largest_ratio": None},
        {"counts_here": [1]},
        {"counts_here": {"cat": 0.5}},
    ],
)
def test_malformed_labels_are_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", "coral")
    (run / "labels.json").write_text(json.dumps(REPORT.to_json() | change))
    with pytest.raises(IntegrityError, match=re.escape(str(run / "labels.json"))):
        write_report([run], tmp_path / "report.html")


def test_the_run_that_built_a_memory_adds_no_stream_beside_its_students(tmp_path: Path) -> None:
    file = make_memory(tmp_path / "memory.safetensors")
    builder = make_run(tmp_path / "memory", stage="memory", method="", memory_file=str(file))
    student = evaluated(tmp_path / "run", "coral", memory_file=str(file))
    both = read_streams(group_runs(load_runs([builder, student])))
    assert [(s.what, s.users) for s in both if "memory" in s.what] == [
        (f"memory {tmp_path.name}", ("coral",))
    ]
    [alone] = read_streams(group_runs(load_runs([builder])))
    assert alone.samples == 9
