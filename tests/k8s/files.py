"""What lies in ``k8s/monitoring``, read as those read it for whom it is meant."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import yaml

from tests.conftest import REPOSITORY

MONITORING = REPOSITORY / "k8s" / "monitoring"
UNIT_TESTS = sorted((MONITORING / "tests").glob("*.yaml"))

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def read_yaml(name: str) -> dict[str, Any]:
    """One object of ``k8s/monitoring``."""
    content = yaml.safe_load((MONITORING / name).read_text())
    assert isinstance(content, dict)
    return content


def rules() -> dict[str, Any]:
    """What the operator hands to Prometheus: the spec, which is a rule file."""
    spec = read_yaml("prometheus_rule.yaml")["spec"]
    assert isinstance(spec, dict)
    return spec


def alerts() -> dict[str, dict[str, Any]]:
    """Alerting rules by name."""
    every = [rule for group in rules()["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in every if "alert" in rule}


def records() -> dict[str, str]:
    """Expressions that are recorded, by name."""
    every = [rule for group in rules()["groups"] for rule in group["rules"]]
    return {rule["record"]: rule["expr"] for rule in every if "record" in rule}


def dashboard() -> dict[str, Any]:
    """The dashboard's model."""
    content = json.loads((MONITORING / "grafana_dashboard.json").read_text())
    assert isinstance(content, dict)
    return content


def queries() -> list[str]:
    """Every expression of the dashboard, its variables replaced by what Grafana would put."""
    model = dashboard()
    targets = [target for panel in model["panels"] for target in panel.get("targets", [])]
    notes = [note for note in model["annotations"]["list"] if "expr" in note]
    values = {"$__rate_interval": "1m", "$__range": "6h"}
    values |= {f"${variable['name']}": ".*" for variable in model["templating"]["list"]}
    expressions = []
    for expression in (each["expr"] for each in [*targets, *notes]):
        for name, value in values.items():
            expression = expression.replace(name, value)
        expressions.append(expression)
    return expressions


def shortened(spec: dict[str, Any], by: int) -> dict[str, Any]:
    """The rules with every duration divided: ``for``, ranges, offsets and ``N * 60`` in seconds."""

    def seconds(number: str, unit: str) -> str:
        return f"{round(1000 * int(number) * _SECONDS[unit] / by)}ms"

    def shorten(expression: str) -> str:
        expression = re.sub(r"\b(\d+)([smh])\b", lambda m: seconds(m[1], m[2]), expression)
        # Of 60 * 60 the second one.
        return re.sub(r"(?<=\d \* )60\b", f"{60 / by:g}", expression)

    spec = copy.deepcopy(spec)
    for group in spec["groups"]:
        for rule in group["rules"]:
            rule["expr"] = shorten(rule["expr"])
            if "for" in rule:
                rule["for"] = shorten(rule["for"])
    return spec
