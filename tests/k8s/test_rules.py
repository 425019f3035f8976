"""The rules in promtool's eyes; and each alert is tested, explained, and fires for a reason."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.k8s.conftest import run
from tests.k8s.files import UNIT_TESTS, alerts, read_yaml, records, rules, shortened

RUNBOOK = (REPOSITORY / "docs" / "runbook.md").read_text()


def cases(alert: str) -> list[bool]:
    """For each unit test of the alert, whether it expects it to fire."""
    return [
        bool(case["exp_alerts"])
        for file in UNIT_TESTS
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]


def unit_test(promtool: str, file: Path, directory: Path) -> tuple[int, str]:
    shutil.copy(file, directory)
    done = run(promtool, "test", "rules", file.name, cwd=directory)
    return done.returncode, done.stdout + done.stderr


def test_the_rules_are_valid(promtool: str, rule_directory: Path) -> None:
    done = run(promtool, "check", "rules", "--lint-fatal", "rules.yaml", cwd=rule_directory)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts()) + len(records())} rules found" in done.stdout


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_alerts_fire_and_stay_silent_as_stated(
    promtool: str, rule_directory: Path, file: Path
) -> None:
    code, said = unit_test(promtool, file, rule_directory)
    assert code == 0, said


@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
@pytest.mark.parametrize("expression", ["vector(1)", "vector(1) < 0"], ids=["always", "never"])
def test_the_unit_tests_can_fail(
    promtool: str, tmp_path: Path, file: Path, expression: str
) -> None:
    spec = rules()
    for group in spec["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = expression
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    code, said = unit_test(promtool, file, tmp_path)
    assert code != 0
    tested = {
        case["alertname"]
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == set(re.findall(r"alertname: (\w+)", said))


@pytest.mark.parametrize("alert", alerts())
def test_each_alert_has_a_case_that_fires_and_one_that_does_not(alert: str) -> None:
    assert set(cases(alert)) == {True, False}


@pytest.mark.parametrize(("name", "rule"), alerts().items())
def test_each_alert_says_what_to_do(name: str, rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert set(rule["labels"]) == {"severity"}
    severity = rule["labels"]["severity"]
    assert severity in {"page", "warning", "info"}
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert "{{ $labels.job }}" in notes["summary"]
    base = "https://github.com/cmkd-scale/cmkd_scale/blob/main/docs/runbook.md"
    assert notes["runbook_url"] == f"{base}#{name.lower()}"
    _, _, section = RUNBOOK.partition(f"\n## {name}\n")
    for part in ("See", "Causes", "Do", "Silence"):
        assert f"- **{part}**: " in section.partition("\n## ")[0]
    shown = {"page": "**page**", "warning": "*warning*", "info": "*info*"}[severity]
    assert f"| [{name}](#{name.lower()}) | {shown} | " in RUNBOOK


def test_the_runbook_explains_no_other() -> None:
    assert set(re.findall(r"^## (Cmkd\w+)$", RUNBOOK, re.MULTILINE)) == set(alerts())
    assert set(re.findall(r"\bCmkd\w+", RUNBOOK)) == set(alerts())


@pytest.mark.parametrize("page", ["runbook.md", "monitoring.md"])
def test_links_lead_somewhere(page: str) -> None:
    docs = REPOSITORY / "docs"
    for target in re.findall(r"\]\(([^)]+)\)", (docs / page).read_text()):
        name, _, anchor = target.partition("#")
        titles = re.findall(r"^#+ (.+)$", (docs / (name or page)).read_text(), re.MULTILINE)
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}


def test_one_group_records_and_the_others_alert() -> None:
    first, *others = rules()["groups"]
    assert {rule["record"] for rule in first["rules"]} == set(records())
    assert all("alert" in rule for group in others for rule in group["rules"])


def test_shortened_rules_differ_in_durations_alone() -> None:
    short = {
        rule.get("alert", rule.get("record")): rule
        for group in shortened(rules(), 30)["groups"]
        for rule in group["rules"]
    }
    assert short["CmkdRunStalled"]["for"] == "2000ms"
    assert "run:cmkd_step_age_seconds < 60 * 2)" in short["CmkdRunStalled"]["expr"]
    assert "5 * 2\n" in short["run:cmkd_step_patience_seconds"]["expr"]
    assert "[12000ms]" not in short["CmkdRunLost"]["expr"]
    assert short["CmkdRunLost"]["expr"].count("[720000ms]") == 3
    assert "[360000ms] offset 30000ms" in short["run:cmkd_steps:median3h"]["expr"]
    assert "> 1 / 60" in short["CmkdThroughputDrop"]["expr"]
    assert short["CmkdBadSamples"] == alerts()["CmkdBadSamples"]
    left = [re.findall(r"\[\d+[smh]\]", rule["expr"]) for rule in short.values()]
    assert not any(left)


def test_the_crd_has_no_key_that_the_operator_does_not_know() -> None:
    crd = read_yaml("prometheus_rule.yaml")
    assert set(crd) == {"apiVersion", "kind", "metadata", "spec"}
    assert (crd["apiVersion"], crd["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert set(crd["metadata"]) == {"name", "labels"}
    assert set(crd["spec"]) == {"groups"}
    assert all(set(group) == {"name", "rules"} for group in crd["spec"]["groups"])
