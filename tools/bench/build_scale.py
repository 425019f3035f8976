"""Building a memory of many classes: everything after the teacher's pass, from its spool on disk.

    python tools/bench/build_scale.py [--quick] [--json FILE]

Synthetic features of width 1024, 32 samples a class, 16 prototypes a class, one process, one
thread; each size in a process of its own, so that its peak of resident memory is its own. The
ratio is CPU time a class, divided by that of the first row; soft labels of n classes cost n
products a sample, so it grows with n. The row ``100 classes again`` is A against A: its
distance from 1 is the noise. ``above start`` is the peak less what the process held when the
spool was written; it should not exceed two copies of the memory and 1.5 GiB.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.memory.bank import FILE_NAME, save_memory
from cmkd_scale.memory.build import build_memory
from cmkd_scale.memory.one_class import Recipe
from cmkd_scale.memory.spool import Spool
from cmkd_scale.memory.spool_part import PassedBatch
from cmkd_scale.memory.statistics import Moments
from tools.bench._bench import Goal, Rows, finish, parse

DIM, SAMPLES, PROTOTYPES = 1024, 32, 16
QUICK = [100, 1000, 5000]
WHOLE = 21_000
_BATCH = 128


def fill(spool: Spool, classes: int) -> None:
    """Batches of mixed classes, as a shuffled set of shards would give."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(classes * SAMPLES, generator=generator) % classes
    for number, labels in enumerate(order.split(_BATCH)):
        positions = torch.arange(len(labels)) + number * _BATCH
        centres = torch.sin(labels.unsqueeze(1) * torch.arange(1, DIM + 1) * 0.37)
        features = centres + 0.5 * torch.randn(len(labels), DIM, generator=generator)
        kept = torch.ones(len(labels), dtype=torch.bool)
        spool.add(PassedBatch(number, positions, labels, features, kept, positions[:0]))
    spool.flush()


def build(classes: int) -> dict[str, float]:
    """Fill a spool, build the memory from it, save it; the figures of building and saving."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, DIM, generator=generator) / DIM**0.5
    recipe = Recipe(weight, torch.zeros(classes), 4.0, PROTOTYPES)
    with tempfile.TemporaryDirectory() as directory:
        spool = Spool(DIM, Path(directory) / "pass")
        fill(spool, classes)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter(), time.process_time()
        names = [str(label) for label in range(classes)]
        memory = build_memory(spool, Moments(classes, 1), recipe, class_names=names, provenance={})
        built = time.perf_counter() - wall
        save_memory(memory, Path(directory) / FILE_NAME)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "classes": classes,
            "seconds": built,
            "seconds_to_save": time.perf_counter() - wall - built,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": 1024.0 * peak,
            "bytes_above_start": 1024.0 * (peak - start),
            "file_bytes": (Path(directory) / FILE_NAME).stat().st_size,
        }


def main() -> None:
    """Measure each size, print the table, and write it if asked."""
    options = parse(__doc__)
    sizes = [("100 classes again", QUICK[0])] + [(f"{n:,} classes", n) for n in QUICK[1:]]
    if not options.quick:
        sizes.append((f"{WHOLE:,} classes", WHOLE))
    rows: Rows = {}
    print(
        f"{'variant':<20}{'ratio':>8}{'build s':>10}{'save s':>8}{'peak MiB':>10}"
        f"{'above start':>13}{'file MiB':>10}"
    )
    for name, classes in [("100 classes", QUICK[0]), *sizes]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(build, (classes,))
        first = next(iter(rows.values()), row)
        row["ratio"] = (row["cpu_seconds"] / classes) / (first["cpu_seconds"] / QUICK[0])
        rows[name] = row
        print(
            f"{name:<20}{row['ratio']:>8.2f}{row['seconds']:>10.1f}{row['seconds_to_save']:>8.1f}"
            f"{row['peak_bytes'] / 2**20:>10.0f}{row['bytes_above_start'] / 2**20:>13.0f}"
            f"{row['file_bytes'] / 2**20:>10.0f}",
            flush=True,
        )
    goals = [
        Goal(
            f"GiB above start, {name}",
            row["bytes_above_start"] / 2**30,
            2 * row["file_bytes"] / 2**30 + 1.5,
        )
        for name, row in rows.items()
        if row["classes"] >= QUICK[-1]
    ]
    finish(rows, goals, options.json)


if __name__ == "__main__":
    main()
