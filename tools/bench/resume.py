"""Time from nothing to the first batch, at the beginning and at 90 % of an epoch, and memory.

    python tools/bench/resume.py [--quick] [--samples N] [--json FILE]

A split of N small texts in shards of 1,000 (built once, below ``runs/bench``) is opened in
fresh processes, in turns: manifest, reader, order, loader, first batch. Imports are not timed.
A ratio is the median over rounds of the variant's time divided by that of a fresh start in the
same round. The row ``fresh start again`` is A against A: its distance from 1 is the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from cmkd_scale.data.build import build
from cmkd_scale.data.manifest import Manifest, load_manifest
from cmkd_scale.data.order import Order, Position
from cmkd_scale.data.sampling import Natural
from cmkd_scale.data.state import stream_state
from cmkd_scale.data.stream import SampleReader
from cmkd_scale.records import Sample

CLASSES, PER_SHARD = 1000, 1000
RESUMED = 0.9
GOAL = 1.5
MIB = 1 << 20


class Texts:
    """``count`` texts of a few words, sorted by class."""

    name = "bench-texts"
    modalities = ("text",)
    splits = ("train",)
    label_names = tuple(f"class {label}" for label in range(CLASSES))

    def __init__(self, count: int) -> None:
        """Make nothing yet."""
        self.count = count
        self.options: Mapping[str, JsonValue] = {"count": count}

    def open(self, modality: str, split: str) -> Texts:
        """The one split."""
        return self

    def __len__(self) -> int:
        """Number of texts."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """One text."""
        label = index * CLASSES // self.count
        members = {"txt": f"text {index} of class {label}".encode(), "cls": str(label).encode()}
        return Sample(key=f"text-{index:08d}", label=label, members=members)


def skip_by_reading(directory: Path, samples: int) -> float:
    """Seconds a sample that webdataset, without decoding, takes to read past what is known.

    Raises:
        ImportError: webdataset is not installed.
    """
    import webdataset

    urls = sorted(map(str, directory.glob("*.tar")))
    dataset = iter(webdataset.WebDataset(urls, shardshuffle=False))
    begin = time.perf_counter()
    for _ in islice(dataset, samples):
        pass
    return (time.perf_counter() - begin) / samples


def in_fresh_process(action: str, directory: Path, argument: str = "") -> dict[str, float]:
    """What an action of ``_resume_process.py`` finds."""
    script = Path(__file__).with_name("_resume_process.py")
    command = [sys.executable, str(script), action, str(directory), argument]
    answer: dict[str, float] = json.loads(subprocess.check_output(command))
    return answer


def measure(directory: Path, states: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Median ratio of each variant to the first one, in turns, after one turn to warm up."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    for turn in range(rounds + 1):
        names = list(states)
        shift = turn % len(names)  # no variant always follows the same one
        for name in names[shift:] + names[:shift]:
            seconds[name].append(in_fresh_process("first", directory, states[name]))
    table = {}
    for name in states:
        pairs = list(zip(seconds[name], seconds[next(iter(states))], strict=True))[1:]
        ratios = sorted(found["wall"] / base["wall"] for found, base in pairs)
        table[name] = {
            "ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "cpu_ratio": statistics.median(found["cpu"] / base["cpu"] for found, base in pairs),
            "milliseconds": 1000 * statistics.median(found["wall"] for found, _ in pairs),
        }
    return table


def sizes(manifest: Manifest) -> dict[str, float]:
    """MiB of the files of a split."""
    directory = manifest.directory
    index = sum(path.stat().st_size for path in directory.glob("*.index.safetensors"))
    return {
        "tars": sum(shard.filesize for shard in manifest.shards) / MIB,
        "indexes": index / MIB,
        "manifest": (directory / "manifest.json").stat().st_size / MIB,
    }


def report(directory: Path, rounds: int) -> dict[str, Any]:
    """Measure and print everything."""
    manifest = load_manifest(directory)
    samples = manifest.samples
    order = Order(Natural(samples), SampleReader(manifest).starts, seed=0)
    position = int(RESUMED * samples)
    state = json.dumps(stream_state(order, manifest.digest, Position(0, position)))
    name = f"resumed at {RESUMED:.0%}"
    rows = measure(directory, {"fresh start": "", "fresh start again": "", name: state}, rounds)
    print(f"{'first batch':<24}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'ms':>8}")
    for variant, row in rows.items():
        quartiles = f"{row['quartile_1']:.3f}-{row['quartile_3']:.3f}"
        print(
            f"{variant:<24}{row['ratio']:>8.3f}{quartiles:>16}{row['cpu_ratio']:>11.3f}"
            f"{row['milliseconds']:>8.1f}"
        )
    files = sizes(manifest)
    print("files, MiB: " + ", ".join(f"{what} {size:.1f}" for what, size in files.items()))
    held = {}
    for workers in (0, 1):
        found = held[f"{workers} workers"] = in_fresh_process("memory", directory, str(workers))
        print(
            f"memory after at most 2,000 batches of 256, MiB, {workers} workers: private "
            f"{found['private']:.1f} (manifest {found['manifest']:.1f}), indexes mapped and "
            f"shared {found['index']:.1f}"
        )
    try:
        skip = position * skip_by_reading(directory, min(position, 20_000))
        print(f"webdataset would read {position:,} samples before it goes on: {skip:.1f} s")
    except ImportError:
        skip = None
        print("webdataset: not installed")
    value = rows[name]["ratio"]
    goal = {"name": name, "value": value, "goal": GOAL, "met": value <= GOAL}
    print(f"goal {name}: {value:.3f} <= {GOAL} met: {goal['met']}")
    return {
        "rows": rows,
        "goals": [goal],
        "samples": samples,
        "files_mib": files,
        "memory_mib": held,
        "webdataset_skip_seconds": skip,
    }


def main() -> None:
    """Measure, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 samples")
    parser.add_argument("--samples", type=int, metavar="N", help="1,000,000 unless given")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where shards go")
    parser.add_argument("--rounds", type=int, help="15, or 5 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    samples = options.samples or (20_000 if options.quick else 1_000_000)
    out = options.out / f"resume-{samples}"
    build(Texts(samples), out, modality="text", split="train", samples_per_shard=PER_SHARD)
    found = report(out / "text" / "train", options.rounds or (5 if options.quick else 15))
    if options.json:
        environment = {"torch": torch.__version__, "machine": platform.processor()}
        options.json.write_text(json.dumps({**found, "environment": environment}, indent=1))


if __name__ == "__main__":
    main()
