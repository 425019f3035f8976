"""What the benchmarks share: variants timed in turns, ratios to the first, a table, JSON.

A ratio is the median over rounds of a variant's time divided by the first variant's in the same
round. Every benchmark times its first variant a second time under the name ``... again``: A
against A, whose distance from 1 is the noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Rows = dict[str, dict[str, float]]
"""Name of a variant -> its figures."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that should not exceed (or, with ``at_least``, not fall below) another."""

    name: str
    value: float
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "value": self.value, "goal": self.goal, "met": self.met}

    def line(self) -> str:
        """For people."""
        sign = ">=" if self.at_least else "<="
        verdict = "met" if self.met else "NOT met"
        return f"goal {self.name}: {self.value:.3f} {sign} {self.goal:g}: {verdict}"


def parse(description: str | None) -> argparse.Namespace:
    """The options of every benchmark: ``--quick`` and ``--json FILE``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def measure(variants: Mapping[str, Callable[[], object]], rounds: int) -> Rows:
    """Time variants in turns; ratios are to the first of them."""
    for run in variants.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        # The order changes by turn, so that no variant always follows the same one.
        names = list(variants)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            wall_before, cpu_before = time.perf_counter(), time.process_time()
            variants[name]()
            wall[name].append(time.perf_counter() - wall_before)
            cpu[name].append(time.process_time() - cpu_before)
    base = next(iter(variants))
    rows = {}
    for name in variants:
        ratios = sorted(s / b for s, b in zip(wall[name], wall[base], strict=True))
        rows[name] = {
            "ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "cpu_ratio": statistics.median(
                s / b for s, b in zip(cpu[name], cpu[base], strict=True)
            ),
            "milliseconds": 1000 * statistics.median(wall[name]),
        }
    return rows


def print_rows(rows: Rows, *, title: str = "variant") -> None:
    """A line a variant."""
    width = max(len(title), *map(len, rows)) + 2
    print(f"{title:<{width}}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'ms':>11}")
    for name, row in rows.items():
        quartiles = f"{row['quartile_1']:.3f}-{row['quartile_3']:.3f}"
        print(
            f"{name:<{width}}{row['ratio']:>8.3f}{quartiles:>16}{row['cpu_ratio']:>11.3f}"
            f"{row['milliseconds']:>11.2f}"
        )


def finish(rows: Any, goals: list[Goal], file: Path | None, **versions: str) -> None:
    """Print the goals; write rows, goals and environment as JSON if a file is given."""
    for goal in goals:
        print(goal.line())
    if file is not None:
        environment = {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **versions,
        }
        content = {
            "rows": rows,
            "goals": [goal.to_json() for goal in goals],
            "environment": environment,
        }
        file.write_text(json.dumps(content, indent=1))


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
