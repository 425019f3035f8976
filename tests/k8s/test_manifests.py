"""What is applied to a cluster: no key that its controllers would ignore, no file that is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.k8s.files import MONITORING, read_yaml

# The keys of the CRD podmonitors.monitoring.coreos.com that are in use, with their types.
POD_MONITOR = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {"app.kubernetes.io/name": str}},
    "spec": {
        "jobLabel": str,
        "selector": {"matchLabels": {"app.kubernetes.io/name": str}},
        "podMetricsEndpoints": [
            {
                "path": str,
                "interval": str,
                "scrapeTimeout": str,
                "relabelings": [
                    {"sourceLabels": [str], "regex": str, "action": str, "targetLabel": str}
                ],
            }
        ],
    },
}
KUSTOMIZATION = {
    "apiVersion": str,
    "kind": str,
    "resources": [str],
    "configMapGenerator": [
        {"name": str, "files": [str], "options": {"labels": {"grafana_dashboard": str}}}
    ],
    "generatorOptions": {"disableNameSuffixHash": bool},
}


def check(value: Any, form: Any, path: str) -> None:
    """Fail on a key that ``form`` lacks, or a value of another type."""
    if isinstance(form, dict):
        assert isinstance(value, dict), path
        assert set(value) <= set(form), f"{path}: {set(value) - set(form)}"
        for key, part in value.items():
            check(part, form[key], f"{path}.{key}")
    elif isinstance(form, list):
        assert isinstance(value, list), path
        for part in value:
            check(part, form[0], f"{path}[]")
    else:
        assert type(value) is form, path


@pytest.mark.parametrize(
    ("file", "form"),
    [("pod_monitor.yaml", POD_MONITOR), ("kustomization.yaml", KUSTOMIZATION)],
)
def test_every_key_is_known(file: str, form: dict[str, Any]) -> None:
    check(read_yaml(file), form, file)


def test_an_unknown_key_is_seen() -> None:
    spoilt = read_yaml("pod_monitor.yaml")
    spoilt["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["sourceLabel"] = "x"
    with pytest.raises(AssertionError, match="sourceLabel"):
        check(spoilt, POD_MONITOR, "")


def test_ranks_are_found_by_the_names_of_their_ports_and_a_run_is_a_job() -> None:
    spec = read_yaml("pod_monitor.yaml")["spec"]
    assert spec["jobLabel"] == "cmkd.dev/run"
    assert spec["selector"] == {"matchLabels": {"app.kubernetes.io/name": "cmkd-scale"}}
    (endpoint,) = spec["podMetricsEndpoints"]
    keep = endpoint["relabelings"][0]
    assert keep["action"] == "keep"
    assert keep["sourceLabels"] == ["__meta_kubernetes_pod_container_port_name"]
    # Prometheus anchors expressions at both ends.
    found = re.compile(keep["regex"])
    assert all(found.fullmatch(name) for name in ("metrics", "metrics-1", "metrics-7"))
    assert not any(found.fullmatch(name) for name in ("", "rendezvous", "metrics-", "x-metrics"))


def test_everything_that_lies_there_is_applied() -> None:
    content = read_yaml("kustomization.yaml")
    named = {*content["resources"], "kustomization.yaml"}
    for generator in content["configMapGenerator"]:
        named |= set(generator["files"])
        # Grafana's sidecar finds dashboards by this label; of another name none would replace it.
        assert generator["options"] == {"labels": {"grafana_dashboard": "1"}}
    assert content["generatorOptions"] == {"disableNameSuffixHash": True}
    assert named == {path.name for path in MONITORING.iterdir() if path.is_file()}
