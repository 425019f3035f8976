"""Options of verbs that have many, and the kinds of numbers that options may be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ASSUMPTIONS: tuple[tuple[str, str, float, str], ...] = (
    ("device-speed", "device_speed", 1.0, "of a device there, over that of the one here"),
    ("link-gb-per-second", "link_bytes_per_second", 1e9, "between devices of a node, one way"),
    ("network-gb-per-second", "network_bytes_per_second", 1e9, "between nodes, one way, a node"),
    ("latency-us", "latency_seconds", 1e-6, "of a message"),
    ("overlap", "overlap", 1.0, "share of backward that an exchange hides behind, 0 to 1"),
    ("straggler-deviation", "straggler_deviation", 1.0, "of a rank's time a step, over its mean"),
    ("node-failure-hours", "node_failure_hours", 1.0, "mean time between failures of a node"),
    ("restart-seconds", "restart_seconds", 1.0, "from a failure until training goes on"),
)
"""Option, field of ``plan_cluster.Cluster``, unit, help."""


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Where a run is to take place; what is not given is assumed, and printed with the plan."""
    parser.add_argument("--nodes", type=count, required=True, metavar="N")
    parser.add_argument("--devices-per-node", type=count, required=True, metavar="M")
    parser.add_argument("--backend", help="default: the first that fits, or ddp")
    parser.add_argument("--device-gib", type=positive, metavar="X", help="memory of a device")
    for option, _, _, text in _ASSUMPTIONS:
        kind = share if option == "overlap" else positive
        parser.add_argument(f"--{option}", type=kind, metavar="X", help=text)


def assumptions(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by field of ``plan_cluster.Cluster``."""
    given = (
        (field, getattr(options, name.replace("-", "_")), unit)
        for name, field, unit, _ in _ASSUMPTIONS
    )
    return {field: unit * value for field, value, unit in given if value is not None}


def add_pods(parser: argparse.ArgumentParser) -> None:
    """What the pods of a run have and are called; what is not given has its default."""
    for name, metavar, text in (
        ("name", "NAME", "of the objects; default: the directory that the runs share"),
        ("image", "IMAGE", "default: cmkd-scale of this version, for cpu or cuda"),
        ("namespace", "NAME", "default: kubectl's"),
        ("queue", "NAME", "Kueue's local queue"),
        ("pvc", "NAME", "claim that holds shards and runs; default: cmkd-runs"),
        ("pvc-size", "SIZE", "render that claim, too"),
        ("secret", "NAME", "its keys become environment variables"),
        ("memory", "SIZE", "of a pod; default: 32Gi"),
        ("shm", "SIZE", "of /dev/shm, a part of it; default: 8Gi"),
        ("scratch", "SIZE", "of the cache of remote shards; default: 100Gi"),
        ("interface", "NAME", "network between pods; default: eth0"),
    ):
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    for name, text in (
        ("nodes", "pods of a stage; default: 1"),
        ("gpus-per-node", "default: 0"),
        ("processes-per-node", "without GPUs; default: 1"),
        ("cpus-per-process", "default: 4"),
        ("grace-seconds", "that a pod has to save when it must go; default: 600"),
        ("max-restarts", "of a stage, less those after preemption; default: 10"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """What to predict, and how."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="that cmkd export has written")
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a directory stands for the files below it with extensions of the model's modality, "
        "- for names on standard input, one a line",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="for a model of texts; may be repeated"
    )
    parser.add_argument(
        "--top-k", type=count, default=5, metavar="K", help="labels of each; default: 5"
    )
    parser.add_argument("--batch-size", type=count, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode; default: none"
    )
    parser.add_argument("--device", metavar="D", help="of torch; default: a GPU if there is one")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch")
    parser.add_argument(
        "--jsonl", action="store_true", help="one JSON object a file, as soon as it is there"
    )


def count(text: str) -> int:
    """A whole number from 1 on."""
    return int(_within(text, int, 1, 1_000_000))


def positive(text: str) -> float:
    """A number above 0."""
    return _within(text, float, 1e-9, 1e12)


def share(text: str) -> float:
    """A number from 0 to 1."""
    return _within(text, float, 0.0, 1.0)


def _within(text: str, kind: Callable[[str], float], low: float, high: float) -> float:
    value = kind(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
    return value
