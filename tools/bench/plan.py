"""``cmkd plan`` against what it plans: memory of the largest rank, and time of the whole run.

    python tools/bench/plan.py [--quick] [--json FILE]

Each configuration is planned in one process and then run, both from a process's start to its end,
in turns; a ratio is that of what was planned to what came, the median over rounds. Memory is the
largest resident set of any rank; ``beyond`` leaves out of both what a process has before there is
a model. Two ranks are planned with the speed and latency of the loopback device and with
what two busy processes take from each other (``--device-speed``), measured before each of them, and
with nothing hidden, since gloo computes on the cores that train.

Ranks have one thread each, data are the bundled numbers, runs lie in a temporary directory (TMPDIR
chooses the disk).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench._bench import Goal, finish, parse

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("_plan_run.py")
MEMORY_GOAL, TIME_GOAL = 0.15, 0.25
"""Largest distance of a ratio from 1."""

Tree = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration that is planned and run."""

    name: str
    stage: str
    modality: str
    steps: int
    batch: int
    model: dict[str, int]
    ranks: int = 1
    backend: str = "ddp"
    train: dict[str, Any] = field(default_factory=dict)

    def tree(self, run: Path, memory: Path | None = None) -> Tree:
        """Its config."""
        tree: Tree = {
            "run": {"dir": str(run)},
            "data": {
                "shards": f"builtin:numbers/{self.modality}",
                "options": {"train_per_class": 10, "test_per_class": 1},
            },
            "model": dict(self.model),
            "train": {
                "steps": self.steps,
                "global_batch_size": self.batch,
                "checkpoint_every_steps": max(1, self.steps // 2),
                **self.train,
            },
        }
        if self.stage == "student":
            tree["memory"] = {"run": str(memory)}
        return tree


QUICK = (
    Case("resnet", "teacher", "image", 60, 60, {"width": 16}),
    Case("resnet, 2 ranks ddp", "teacher", "image", 60, 60, {"width": 16}, ranks=2),
)
LARGE = {"width": 512, "depth": 8}
"""25 million parameters: what a rank holds is mostly weights, gradients and moments."""

FULL = (
    Case("resnet", "teacher", "image", 150, 60, {"width": 32}),
    Case("student, prototype memory", "student", "audio", 60, 60, {"width": 32}),
    Case("transformer", "teacher", "text", 10, 8, LARGE),
    Case(
        "transformer, blocks recomputed, 2 parts",
        "teacher",
        "text",
        6,
        16,
        LARGE,
        train={"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    ),
    Case("resnet, 2 ranks ddp", "teacher", "audio", 60, 60, {"width": 32}, ranks=2),
    *(
        Case(f"transformer, 2 ranks {name}", "teacher", "text", 8, 8, LARGE, ranks=2, backend=name)
        for name in ("ddp", "fsdp2", "zero3")
    ),
)


def environment(backend: str = "ddp") -> dict[str, str]:
    """Of a process that trains on a CPU."""
    kept = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    device = "DS_ACCELERATOR" if backend.startswith("zero") else "ACCELERATE_USE_CPU"
    return {**kept, **ours, device: "cpu" if device == "DS_ACCELERATOR" else "true"}


def launcher(ranks: int, backend: str) -> list[str]:
    """The words before a script."""
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if backend.startswith("zero"):
        file = REPOSITORY / "launchers" / "deepspeed" / f"{backend}.json"
        chosen = ["--use_deepspeed", "--deepspeed_config_file", str(file)]
    elif backend == "fsdp2":
        file = REPOSITORY / "launchers" / "accelerate" / "fsdp2.yaml"
        chosen = ["--config_file", str(file)]
    else:
        chosen = ["--multi_gpu"]
    return [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *chosen),
        *("--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", port),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]


def work(kind: str, out: Path, config: Path | None, ranks: int, backend: str) -> dict[str, float]:
    """What the worker's ranks say: the largest of each value."""
    words = [str(WORKER), kind, str(out), *([] if config is None else [str(config)])]
    subprocess.run(
        [*launcher(ranks, backend), *words],
        env=environment(backend),
        check=True,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    rows = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def planned(case: Case, config: Path, link: Mapping[str, float]) -> dict[str, float]:
    """What ``cmkd plan`` says of it."""
    command = [
        *(sys.executable, "-m", "cmkd_scale", "plan", "--json", "--config", str(config)),
        *("--nodes", "1", "--devices-per-node", str(case.ranks), "--overlap", "0"),
        *("--link-gb-per-second", str(link["bytes_per_second"] / 1e9)),
        *("--latency-us", str(link["latency_seconds"] * 1e6), "--stage", case.stage),
        *("--device-speed", str(link["device_speed"])),
        *(("--backend", case.backend) if case.ranks > 1 else ()),
    ]
    found = json.loads(
        subprocess.check_output(
            command, env=environment(), cwd=REPOSITORY, stderr=subprocess.DEVNULL
        )
    )
    rank = found["memory"][found["backend"]]
    return {
        "seconds": 3600 * found["forecast"]["hours_without_failures"],
        "bytes": rank["device_bytes"] + rank["host_bytes"],
        "before": rank["host"]["runtime"],
        "step_seconds": found["forecast"]["step_seconds"],
    }


ALONE = {"bytes_per_second": 1e9, "latency_seconds": 1e-4, "device_speed": 1.0}
"""For one rank, which has nobody to talk to."""


def compare(case: Case, root: Path, memory: Path, rounds: int) -> Any:
    """Plan and run it in turns; medians."""
    found = []
    for number in range(rounds):
        place = root / f"{case.name.replace(' ', '_')}_{number}"
        place.mkdir()
        config = place / "config.yaml"
        config.write_text(yaml.safe_dump(case.tree(place / "run", memory)))
        link = ALONE if case.ranks == 1 else work("link", place / "link", None, case.ranks, "ddp")
        plan = planned(case, config, link)
        came = work(case.stage, place / "came", config, case.ranks, case.backend)
        found.append((plan, came))
    return {
        "device_speed": link["device_speed"],
        "memory_ratio": statistics.median(p["bytes"] / c["bytes"] for p, c in found),
        "beyond_ratio": statistics.median(
            (p["bytes"] - p["before"]) / (c["bytes"] - p["before"]) for p, c in found
        ),
        "time_ratio": statistics.median(p["seconds"] / c["seconds"] for p, c in found),
        "planned_mib": statistics.median(p["bytes"] for p, _ in found) / 2**20,
        "mib": statistics.median(c["bytes"] for _, c in found) / 2**20,
        "planned_seconds": statistics.median(p["seconds"] for p, _ in found),
        "seconds": statistics.median(c["seconds"] for _, c in found),
    }


def show(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print a line for each configuration."""
    print(
        f"{'configuration':<42}{'MiB':>8}{'planned':>9}{'ratio':>8}{'beyond':>8}"
        f"{'seconds':>9}{'planned':>9}{'ratio':>8}"
    )
    for name, row in rows.items():
        print(
            f"{name:<42}{row['mib']:>8.0f}{row['planned_mib']:>9.0f}{row['memory_ratio']:>8.2f}"
            f"{row['beyond_ratio']:>8.2f}{row['seconds']:>9.1f}{row['planned_seconds']:>9.1f}"
            f"{row['time_ratio']:>8.2f}"
        )


def goals_of(rows: Mapping[str, Mapping[str, float]]) -> list[Goal]:
    """What is planned is near to what comes, for each configuration."""
    goals = []
    for name, row in rows.items():
        memory, seconds = abs(row["memory_ratio"] - 1), abs(row["time_ratio"] - 1)
        goals.append(Goal(f"{name}: memory, off by", memory, MEMORY_GOAL))
        goals.append(Goal(f"{name}: time, off by", seconds, TIME_GOAL))
    return goals


def make_memory(root: Path) -> Path:
    """A teacher of pictures, and its memory."""
    teacher = Case("teacher of the memory", "teacher", "image", 40, 60, {"width": 16})
    config = root / "teacher.yaml"
    config.write_text(yaml.safe_dump(teacher.tree(root / "teacher")))
    work("teacher", root / "teacher_came", config, 1, "ddp")
    other = root / "memory.yaml"
    tree = {"run": {"dir": str(root / "memory")}, "teacher": {"run": str(root / "teacher")}}
    other.write_text(yaml.safe_dump(tree))
    subprocess.run(
        [sys.executable, "-m", "cmkd_scale", "memory", "--config", str(other)],
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    )
    return root / "memory"


def main() -> None:
    """Plan, run, print the table, and write it if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    cases, rounds = (QUICK, 1) if options.quick else (FULL, 3)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as name:
        root = Path(name)
        memory = root if options.quick else make_memory(root)
        for case in cases:
            rows[case.name] = compare(case, root, memory, rounds)
            show({case.name: rows[case.name]})
    show(rows)
    finish(rows, goals_of(rows), options.json)


if __name__ == "__main__":
    main()
