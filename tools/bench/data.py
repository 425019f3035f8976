"""Samples a CPU-second, decoding included, beside webdataset, litdata, mosaicml-streaming, wids.

    python tools/bench/data.py [--quick] [--large] [--fsdd DIR] [--json FILE]

The same samples go through the same decoders: 64 x 64 crops of photographs as JPEG (``--large``
adds 224 x 224), recordings of spoken digits as WAV, vectors of 128 numbers as .npy. Each library
reads its own shuffled training order from about 10 shards, in batches of 64; those that take a
collate function get one that decodes and stacks, which is the least that they can do.

A turn is an epoch: after some batches to warm up, most of it is timed, and the rest is read so
that nothing of it runs on. Libraries take turns; a ratio is the median over rounds of our rate
divided by theirs in the same round. CPU seconds are those of all threads and worker processes.
The row ``ours again`` is A against A: its distance from 1 is the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench._data_libraries import BATCH, READERS, Batches, Stored
from tools.bench._data_samples import KINDS, LARGE, contents

WARM = 10
TIMED = 0.6  # of an epoch's batches: the rest is left for warming up and for shuffle buffers
GOALS = {("jpg", "webdataset"): 3.0, ("npy", "webdataset"): 3.0} | {
    (kind, "litdata"): 1.0 for kind in ("jpg", "wav", "npy")
}
FSDD = Path(__file__).resolve().parents[3] / "shared" / "data" / "fsdd"


def cpu_seconds() -> float:
    """Of this process and of all processes below it that live."""
    below = psutil.Process().children(recursive=True)
    times = [child.cpu_times() for child in below]
    return time.process_time() + float(sum(found.user + found.system for found in times))


def turn(batches: Batches, timed: int) -> dict[str, float]:
    """Samples a CPU-second and a second of wall time, over ``timed`` batches of an epoch."""
    for _ in range(WARM):
        next(batches)
    cpu, wall, samples = cpu_seconds(), time.perf_counter(), 0
    for _, labels in itertools.islice(batches, timed):
        samples += len(labels)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    for _ in batches:
        pass
    return {"cpu": samples / cpu, "wall": samples / wall}


def measure(data: Stored, workers: int, rounds: int) -> dict[str, dict[str, float] | None]:
    """Median rates and ratios of ours to each library, in turns; None: not installed."""
    timed = int(TIMED * (len(data) // BATCH))
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    missing = set()
    for number in range(rounds):
        names = [name for name in READERS if name not in missing]
        shift = number % len(names)  # no library always follows the same one
        for name in names[shift:] + names[:shift]:
            try:
                rates[name].append(turn(READERS[name](data, workers), timed))
            except ImportError:
                missing.add(name)
    table: dict[str, dict[str, float] | None] = dict.fromkeys(READERS)
    for name in READERS.keys() - missing:
        pairs = list(zip(rates["ours"], rates[name], strict=True))
        ratios = sorted(ours["cpu"] / theirs["cpu"] for ours, theirs in pairs)
        table[name] = {
            "cpu_ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "wall_ratio": statistics.median(a["wall"] / b["wall"] for a, b in pairs),
            "per_cpu_second": statistics.median(rate["cpu"] for rate in rates[name]),
            "per_second": statistics.median(rate["wall"] for rate in rates[name]),
        }
    return table


def show(title: str, table: Mapping[str, Mapping[str, float] | None]) -> None:
    """Print one table."""
    print(f"{title:<34}{'ours : it':>10}{'quartiles':>14}{'wall':>8}{'/cpu s':>10}{'/s':>10}")
    for name, row in table.items():
        if row is None:
            print(f"  {name:<32}{'not installed':>24}")
            continue
        quartiles = f"{row['quartile_1']:.2f}-{row['quartile_3']:.2f}"
        print(
            f"  {name:<32}{row['cpu_ratio']:>10.2f}{quartiles:>14}{row['wall_ratio']:>8.2f}"
            f"{row['per_cpu_second']:>10,.0f}{row['per_second']:>10,.0f}",
            flush=True,
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All tables, printed as they come."""
    kinds = {name: kind for name, kind in KINDS.items() if name in options.kinds}
    kinds |= LARGE if options.large else {}
    samples = options.samples or (4_000 if options.quick else 8_000)
    rounds = options.rounds or (3 if options.quick else 5)
    rows, goals = {}, []
    for name, kind in kinds.items():
        with tempfile.TemporaryDirectory(prefix="bench-data-") as root:
            data = Stored(kind, contents(kind, samples, options.fsdd), Path(root))
            size = sum(map(len, data.contents)) // samples
            for workers in options.workers or ([0] if options.quick else [0, 1, 2]):
                title = f"{name}, {size:,} bytes, {workers} workers"
                rows[title] = table = measure(data, workers, rounds)
                show(title, table)
                for (goal_kind, peer), goal in GOALS.items():
                    row = table[peer]
                    if goal_kind == name and workers == 0 and row is not None:
                        value = row["cpu_ratio"]
                        met = value >= goal
                        about = f"{name}: samples a CPU-second over {peer}"
                        goals.append({"name": about, "value": value, "goal": goal, "met": met})
    return {"rows": rows, "goals": goals, "samples": samples, "rounds": rounds}


def main() -> None:
    """Measure, print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer samples, no workers")
    parser.add_argument("--large", action="store_true", help="JPEGs of 224 x 224, too")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--workers", nargs="+", type=int, help="0 1 2, or 0 with --quick")
    parser.add_argument("--fsdd", type=Path, default=FSDD, help="holds recordings/*.wav")
    parser.add_argument("--samples", type=int, help="8,000, or 4,000 with --quick")
    parser.add_argument("--rounds", type=int, help="5, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options)
    for goal in found["goals"]:
        print(f"goal {goal['name']}: {goal['value']:.2f} >= {goal['goal']} met: {goal['met']}")
    if options.json:
        environment = {"torch": torch.__version__, "machine": platform.processor()}
        for package in (*list(READERS)[2:], "simplejpeg", "soundfile", "numpy"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                environment[package] = importlib.metadata.version(package)
        options.json.write_text(json.dumps({**found, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
