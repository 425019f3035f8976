"""The section on the error bound: what it reads, what it says, what it draws."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmkd_scale.diagnostics.bound import memory_bound
from cmkd_scale.errors import IntegrityError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.monitoring.report_bound import Bound, bound_plot, bound_sentence, read_bounds
from cmkd_scale.monitoring.report_runs import group_runs, load_runs
from tests.memory.examples import example_memory

MINUS = "\u2212"
SCALARS = ("risk", "teacher_term", "label_gap", "transfer_gap", "teacher_cross_entropy")


def entry(**numbers: float) -> dict[str, Any]:
    """An entry of ``bound`` as the evaluation writes it, with some numbers replaced."""
    terms = {
        "risk": 1.43,
        "teacher_term": 0.09,
        "label_gap": 1.2,
        "transfer_gap": 0.14,
        "teacher_cross_entropy": 1.42,
    } | {name: value for name, value in numbers.items() if name in SCALARS}
    plain = {"teacher_term": 0.14, "label_gap": 0.01, "transfer_gap": 1.28}
    plain |= {name[6:]: value for name, value in numbers.items() if name.startswith("plain_")}
    return {
        "samples": 100,
        **{name: {"value": v, "low": v - 0.01, "high": v + 0.01} for name, v in terms.items()},
        "without_kappa": plain,
        "bounds": {"U1": {"value": 1.8}, "U2": {"value": 0.85}, "U3": {"value": 1.28}},
        "null": {
            "U3": {"value": 7.6, "low": 7.2, "high": 8.0},
            "p_value": numbers.get("p_value", 0.005),
        },
        "noise_floor": {"value": 0.14, "low": 0.1, "high": 0.2},
        "wrong_class_mass": 0.385,
        "per_class": {
            name: {"share": share, "U3": lost}
            for name, share, lost in zip(
                "abcd", (0.1, 0.5, 0.2, 0.2), (5, 1.5, 2, 0.1), strict=True
            )
        },
    }


def make_run(run: Path, method: str, *entries: Any, seed: int = 0) -> Path:
    run.mkdir(parents=True)
    metrics = {"test/accuracy": 0.5 if "/" in method else 0.6, "bound": list(entries)}
    results = {"stage": "student", "method": method, "seed": seed, "metrics": metrics}
    (run / "results.json").write_text(json.dumps(results))
    return run


def read(*runs: Path) -> list[Bound]:
    return read_bounds(group_runs(load_runs(runs)))


def cells(page: str, method: str) -> list[str]:
    """The row of a method in the section's table."""
    table = page[page.index("The error in numbers") :]
    name = re.escape(method)
    row = re.search(rf'<tr><td class="name">[^\n]*>{name}</span></td>(.*?)</tr>', table, re.DOTALL)
    assert row is not None
    return [
        " ".join(html.unescape(cell).split())
        for cell in re.findall(r"<td[^>]*>(.*?)</td>", row[1], re.DOTALL)
    ]


def test_the_page_shows_the_numbers_of_the_results(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ucmkd_global", entry(transfer_gap=-0.14))
    files = write_report([run], tmp_path / "report.html")
    assert [file.stem for file in files[1:]] == ["accuracy", "bound"]
    page = files[0].read_text()
    assert cells(page, "ucmkd_global") == [
        "1.43 (1.42 to 1.44)",
        "0.09",
        "1.20 (1.19 to 1.21)",
        f"{MINUS}0.14 ({MINUS}0.15 to {MINUS}0.13)",
        *("0.14", "0.01", "1.28", "1.28", "0.85", "1.80", "7.60", "0.005", "0.14", "1.42"),
        "38.5",
    ]
    assert html.unescape(page).count(bound_sentence(read(run))) == 2  # and beside the picture


def test_a_run_without_a_bound_has_no_section(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "ce_ls"), make_run(tmp_path / "b", "kd", {"samples": 0})]
    files = write_report(runs, tmp_path / "report.html")
    assert [file.stem for file in files[1:]] == ["accuracy"]
    assert "Where the error comes from" not in files[0].read_text()


def test_a_method_is_the_mean_over_runs_and_memories(tmp_path: Path) -> None:
    without_floor = entry(risk=2.0) | {"noise_floor": None}
    first = make_run(tmp_path / "a", "ucmkd_global", entry(risk=1.0), without_floor)
    second = make_run(tmp_path / "b", "ucmkd_global", entry(risk=6.0), seed=1)
    [bound] = read(first, second)
    assert bound.entries == 3
    assert bound.numbers["risk"] == pytest.approx(3.0)
    assert bound.numbers["noise_floor"] == pytest.approx(0.14)
    page = write_report([first, second], tmp_path / "report.html")[0].read_text()
    assert cells(page, "ucmkd_global")[0] == "3.00"
    alone = make_run(tmp_path / "c", "kd_memory", without_floor)
    page = write_report([alone], tmp_path / "alone.html")[0].read_text()
    assert cells(page, "kd_memory")[-3] == "\u2013"


@pytest.mark.parametrize(
    ("numbers", "said", "unsaid"),
    [
        ({}, "most is lost in transfer", "head_pull"),
        ({"plain_label_gap": 1.9}, "most is the student's own head", "lost in transfer"),
        ({"plain_teacher_term": 1.9}, "most is the teacher itself", "lost in transfer"),
        ({"p_value": 0.4}, "one whose classes are permuted (p = 0.40)", "head_pull"),
    ],
)
def test_the_sentence_says_what_dominates(
    tmp_path: Path, numbers: dict[str, float], said: str, unsaid: str
) -> None:
    control = make_run(tmp_path / "a", "ucmkd_global/permuted", entry(risk=9.0))
    run = make_run(tmp_path / "b", "ucmkd_global", entry(**numbers))
    sentence = bound_sentence(read(control, run))
    assert sentence.startswith("Of 1.43 nats of error of ucmkd_global, ")
    assert said in sentence
    assert unsaid not in sentence
    assert ("permuted" in sentence) == ("p_value" in numbers)


def test_the_sentence_names_the_classes_that_lose_most(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ucmkd_global", entry())
    assert bound_sentence(read(run)).endswith("(here b, a, c).")


def test_what_the_diagnostics_write_is_what_is_read(tmp_path: Path) -> None:
    memory = example_memory()
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    z = memory.class_mean[labels] + torch.randn(60, 8, generator=g)
    report = memory_bound(memory, z, torch.randn(60, 6, generator=g), labels)
    [bound] = read(make_run(tmp_path / "run", "ucmkd_global", report))
    assert bound.numbers["U2"] == report["bounds"]["U2"]["value"]
    assert bound.numbers["plain_label_gap"] == report["without_kappa"]["label_gap"]
    assert set(bound.worst) < set(memory.class_names)


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    value = copy.deepcopy(entry())
    change(value)
    return value


@pytest.mark.parametrize(
    "bad",
    [
        "text",
        [],
        None,
        {},
        broken(lambda e: e.pop("null")),
        broken(lambda e: e.pop("noise_floor")),
        broken(lambda e: e["risk"].update(value="1")),
        broken(lambda e: e["risk"].update(low=True)),
        broken(lambda e: e["bounds"].update(U3={"value": float("nan")})),
        broken(lambda e: e["per_class"]["a"].pop("share")),
        broken(lambda e: e.update(per_class=[])),
    ],
)
def test_malformed_entries_are_refused_by_name(tmp_path: Path, bad: object) -> None:
    run = make_run(tmp_path / "run", "ucmkd_global", bad)
    with pytest.raises(IntegrityError, match=re.escape(str(run / "results.json"))):
        read(run)


def test_a_bound_that_is_no_list_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "ucmkd_global")
    (run / "results.json").write_text('{"metrics": {"bound": {}}}')
    with pytest.raises(IntegrityError, match="bound is of the JSON type"):
        load_runs([run])


@settings(max_examples=4, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1e-9, 0.0, 0.5, 40.0]), min_size=12, max_size=12),
    methods=st.integers(1, 3),
)
def test_any_numbers_can_be_drawn(values: list[float], methods: int) -> None:
    names = ["risk", *SCALARS[1:4], *(f"plain_{name}" for name in SCALARS[1:4])]
    names += ["U1", "U2", "U3", "null_low", "null_high"]
    numbers = dict(zip(names, values, strict=True)) | {"null_value": 1.0}
    bounds = [Bound(f"$m_{n}$", 1, numbers, ()) for n in range(methods)]
    drawing = bound_plot(bounds)
    assert drawing.png.startswith(b"\x89PNG\r\n\x1a\n")
    assert "$m_0$" in drawing.svg
    assert bound_plot(bounds) == drawing
