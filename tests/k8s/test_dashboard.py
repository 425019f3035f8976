"""The dashboard: its form as Grafana needs it, its queries as Prometheus does."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from tests.k8s.files import dashboard, queries
from tests.k8s.server import Server

ROWS = ["Alive", "Speed", "Data", "Alignment", "Memory", "Checkpoints", "Faults"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_it_has_one_identity_and_its_rows() -> None:
    model = dashboard()
    assert model["uid"] == "cmkd-scale"
    assert model["schemaVersion"] >= 38  # Grafana 10
    assert [p["title"] for p in model["panels"] if p["type"] == "row"] == ROWS
    assert "id" not in model  # a number of the instance that it was exported from


def test_variables_are_there_before_those_that_need_them() -> None:
    known: list[str] = []
    for variable in dashboard()["templating"]["list"]:
        used = [name for name in ("datasource", "namespace", "job", "rank") if name not in known]
        text = str(variable.get("query")) + str(variable.get("datasource"))
        assert not any(f"${name}" in text or f"${{{name}}}" in text for name in used)
        known.append(variable["name"])
    assert known == ["datasource", "namespace", "job", "rank"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    every = dashboard()["panels"]
    assert max(Counter(panel["id"] for panel in every).values()) == 1
    places = [(panel["title"], panel["gridPos"]) for panel in every]
    for (one, a), (other, b) in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or apart, (one, other)
    assert all(place["x"] + place["w"] <= 24 for _, place in places)
    assert [place["y"] for _, place in places] == sorted(place["y"] for _, place in places)


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_each_panel_says_what_it_shows_of_which_runs_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None
    assert panel["datasource"] == DATASOURCE
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references) > 0
    for target in panel["targets"]:
        assert target["datasource"] == DATASOURCE
        assert target["legendFormat"]
        assert 'namespace=~"$namespace", job=~"$job"' in target["expr"]
        # A legend by rank needs the join that brings it.
        joined = 'group_left (rank) cmkd_run_info{namespace=~"$namespace", job=~"$job", rank=~"$r'
        assert ("{{rank}}" in target["legendFormat"]) == (joined in target["expr"])


def test_every_query_is_one(empty_server: Server) -> None:
    wrong = {
        expression: answer["error"]
        for expression in queries()
        if (answer := empty_server.get("query", query=expression))["status"] != "success"
    }
    assert not wrong
    assert not [expression for expression in queries() if "$" in expression]


def test_a_query_that_is_none_is_refused(empty_server: Server) -> None:
    assert empty_server.get("query", query="rate(up)")["status"] == "error"
