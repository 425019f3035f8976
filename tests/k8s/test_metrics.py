"""Every metric that is used exists, every one that exists is explained, and all are well formed."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

import pytest

from cmkd_scale.monitoring.exporter import Identity, PrometheusSink
from cmkd_scale.monitoring.metrics import METRICS
from cmkd_scale.training.watchdog import PHASES
from tests.conftest import REPOSITORY
from tests.k8s.conftest import run
from tests.k8s.files import alerts, queries, records

BY_NAME = {metric.name: metric for metric in METRICS}
SUFFIXES = ("_bucket", "_sum", "_count")
TARGET_LABELS = {"namespace", "job", "instance"}


def used() -> dict[str, set[str]]:
    """Series in rules and dashboard, with the labels that they are chosen by."""
    expressions = [rule["expr"] for rule in alerts().values()]
    expressions += [note for rule in alerts().values() for note in rule["annotations"].values()]
    found: dict[str, set[str]] = {}
    for expression in [*expressions, *records().values(), *queries()]:
        for name, matchers in re.findall(
            r"((?:\w+:)?cmkd_\w+(?::\w+)?)(?:\{([^}]*)\})?", expression.replace("cmkd_scale", "")
        ):
            labels = re.findall(r"(\w+)(?:=~|!=|!~|=)", re.sub(r'"[^"]*"', "", matchers))
            found.setdefault(name, set()).update(labels)
    return found


def base(name: str) -> str:
    """The metric that a series belongs to."""
    for suffix in SUFFIXES:
        metric = BY_NAME.get(name.removesuffix(suffix))
        if name.endswith(suffix) and metric is not None and metric.kind == "histogram":
            return metric.name
    return name


def test_every_series_in_use_is_exported_or_recorded() -> None:
    names = used()
    assert len(names) > 30
    assert {base(name) for name in names} <= set(BY_NAME) | set(records())
    histograms = {metric.name for metric in METRICS if metric.kind == "histogram"}
    assert not histograms & set(names)  # only their parts are series


def test_every_label_in_use_exists() -> None:
    for name, labels in used().items():
        metric = BY_NAME.get(base(name))
        known = set(metric.labels) | {"le"} if metric is not None else set()
        assert labels <= known | TARGET_LABELS, name


def test_every_phase_in_use_exists() -> None:
    expressions = [rule["expr"] for rule in alerts().values()] + list(records().values())
    named = re.findall(r'phase=~?"([^"]+)"', " ".join(expressions))
    assert {phase for group in named for phase in group.split("|")} == {"start", "guard", *PHASES}


def test_every_metric_is_looked_at() -> None:
    assert {base(name) for name in used()} >= set(BY_NAME)
    recorded = set(records())
    assert recorded <= set(used())


def test_every_metric_is_explained() -> None:
    text = (REPOSITORY / "docs" / "monitoring.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `cmkd_")]
    assert rows == [
        f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.scope} "
        f"| {m.help} |"
        for m in METRICS
    ]
    assert all(f"`{record}`" in text for record in records())


@pytest.mark.parametrize("rank", [0, 1])
def test_promtool_finds_nothing_amiss_in_a_scrape(promtool: str, tmp_path: Path, rank: int) -> None:
    probes = {
        metric.name: (lambda labels=metric.labels: {"data" if labels else "": 1.0})
        for metric in METRICS
        if metric.feed == "probe"
    }
    sink = PrometheusSink(0, identity=Identity(rank=rank, world_size=2), probes=probes)
    try:
        sink.step(1, 0.1, 0.01)
        for metric in METRICS:
            if metric.feed == "set":
                sink.set(metric.name, 1.0)
        keys = [key.replace("*", "any") for metric in METRICS for key in metric.keys]
        sink.log(1, dict.fromkeys(keys, 1.0))
        with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        sink.close()
    exposed = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert exposed == {m.name for m in METRICS if rank == 0 or m.scope == "rank"}
    done = run(promtool, "check", "metrics", cwd=tmp_path, stdin=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    # It does find what is amiss.
    assert run(promtool, "check", "metrics", cwd=tmp_path, stdin="a_total{x=1}").returncode != 0
