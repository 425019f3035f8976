"""What the pods of a chain need beside their job: configs, a network policy, maybe the claim."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cmkd_scale.config import Config, make_config
from cmkd_scale.errors import UsageError
from cmkd_scale.operations.kubernetes_pod import (
    DATA,
    METRICS_PORT,
    Manifest,
    Options,
    Stage,
    chain_labels,
    metadata,
)

_STATUS_PORT = 10443
"""Where Kubeflow Trainer takes a TrainJob's progress."""


def in_pod(config: Config) -> Config:
    """The config as a pod has it: with an endpoint for metrics that the cluster can reach.

    Relative paths stay: they are the claim's.

    Raises:
        UsageError: a path leads to where no pod has anything that lasts.
    """
    outside = [f"{name}={path}" for name, path in _paths(config) if not _on_claim(path)]
    if outside:
        raise UsageError(
            f"No pod has what the config names: {', '.join(outside)}. Copy it to the claim and "
            f"give the path in there, relative or below {DATA}; shards may have a URL."
        )
    monitor = {"prometheus_port": METRICS_PORT, "prometheus_address": "0.0.0.0"}
    tree = _short(config)
    return make_config({**tree, "monitor": {**tree.get("monitor", {}), **monitor}})


def _short(config: Config) -> dict[str, Any]:
    """What differs from the defaults."""
    return config.model_dump(mode="json", exclude_defaults=True)


def _paths(config: Config) -> list[tuple[str, str]]:
    runs = config.memory.run if isinstance(config.memory.run, list) else [config.memory.run]
    found = [
        ("run.dir", config.run.dir),
        ("data.source", config.data.source),
        ("teacher.run", config.teacher.run),
        ("teacher.cache", config.teacher.cache),
        *(("memory.run", run) for run in runs),
        ("memory.previous", config.memory.previous),
        ("monitor.targets_dir", config.monitor.targets_dir),
    ]
    backbone = config.model.backbone
    if backbone is not None and PurePosixPath(backbone).is_absolute():  # else it may be a hub's id
        found.append(("model.backbone", Path(backbone)))
    shards = [("data.shards", config.data.shards), ("teacher.shards", config.teacher.shards)]
    local = [(name, text) for name, text in shards if text and not _remote(text)]
    return [*((name, str(path)) for name, path in found if path is not None), *local]


def _remote(shards: str) -> bool:
    return "://" in shards or shards.startswith("builtin:")


def _on_claim(text: str) -> bool:
    path = PurePosixPath(DATA, text)
    return ".." not in path.parts and path.is_relative_to(DATA)


def config_map(stages: list[Stage], options: Options) -> Manifest:
    """The config of each stage."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(options.config_map, options),
        "data": {
            f"{stage.name}.yaml": yaml.safe_dump(_short(stage.config), sort_keys=False)
            for stage in stages
        },
    }


def volume_claim(size: str, options: Options) -> Manifest:
    """The claim that all pods write to."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(options.pvc, options),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": size}},
        },
    }


def network_policy(kind: str, options: Options) -> Manifest:
    """Who may talk to the pods, and to whom they may.

    Among each other they use any port (NCCL and gloo choose). From elsewhere in the cluster their
    metrics can be had, no more; out they reach names and HTTPS, which object stores and trackers
    speak.
    """
    pods = {"matchLabels": chain_labels(options)}
    names = [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")]
    egress: list[Manifest] = [
        {"to": [{"podSelector": pods}]},
        {"ports": names},
        {"ports": [{"port": 443, "protocol": "TCP"}]},
    ]
    if kind == "trainjob":
        egress.append({"ports": [{"port": _STATUS_PORT, "protocol": "TCP"}]})
    last = METRICS_PORT + options.processes - 1
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(options.name, options),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": pods}]},
                {
                    "from": [{"namespaceSelector": {}}],
                    "ports": [{"port": METRICS_PORT, "endPort": last, "protocol": "TCP"}],
                },
            ],
            "egress": egress,
        },
    }
