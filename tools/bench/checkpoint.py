"""How long training waits for a checkpoint, how long it is slowed, and when the files are there.

    python tools/bench/checkpoint.py [--quick] [--json FILE]

The state is that of a transformer of 100 M parameters after a step of AdamW: 1.2 GB in 948
tensors. One thread of torch, files in a temporary directory (TMPDIR chooses the disk). Two tables:

- Stall: what a call keeps training from going on, as a ratio to the copy of all tensors into
  buffers that are kept, in the same round. ``CheckpointWriter.start`` is timed with its buffers
  warm, and for a writer's first save. ``complete``: seconds from the call until the files are
  complete and on the disk, synced; ours are hashed while they are written, and read back, too.
- Slowdown: steps of a small network, one thread, while a save is under way, as a ratio of the
  seconds a step to those of the same steps with nothing under way, right before. ``cpu ratio`` is
  CPU time of the training thread alone. ``no core``: share of the time that this thread was ready,
  but other programs or the save had all cores (Linux); what remains is the interpreter's lock.

Ratios are medians over rounds, taken in turns; ``again`` is A against A, the noise.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import safetensors
import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import _checkpoint_ways as ways
from tools.bench._bench import Goal, Rows, finish, parse, print_rows
from tools.bench._checkpoint_beside import Timed, Training, slowed, unslowed

GOAL = 1.3
OURS = "CheckpointWriter.start"
ALONE = "nothing under way"
FULL, QUICK = (768, 14), (512, 8)
"""Width and depth of the transformer."""


def timed_save(way: ways.Way) -> Timed:
    """Save, and wait until that is complete."""
    begun, cpu = time.perf_counter(), time.process_time()
    way.start()
    stall, stall_cpu = time.perf_counter() - begun, time.process_time() - cpu
    way.finish()
    complete = time.perf_counter() - begun
    way.clear()
    return Timed(stall, stall_cpu, complete)


def in_turns(variants: Mapping[str, Callable[[], Timed]], rounds: int) -> dict[str, list[Timed]]:
    """What each round found, after one that warms up.

    The order is drawn for each round: what follows a large write is slower for a while.
    """
    found: dict[str, list[Timed]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(variants), len(variants)):
            found[name].append(variants[name]())
    return {name: timings[1:] for name, timings in found.items()}


def rows_of(found: Mapping[str, list[Timed]]) -> Rows:
    """Medians, as ratios to the first variant."""
    base = next(iter(found.values()))
    rows = {}
    for name, timings in found.items():
        ratios = sorted(t.wall / b.wall for t, b in zip(timings, base, strict=True))
        rows[name] = {
            "ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "cpu_ratio": statistics.median(
                t.cpu / b.cpu for t, b in zip(timings, base, strict=True)
            ),
            "milliseconds": 1000 * statistics.median(t.wall for t in timings),
            "complete_seconds": statistics.median(t.complete for t in timings),
        }
    return rows


def stalls(files: ways.Files, directory: Path, rounds: int) -> Rows:
    """Every way to save, in turns."""
    copy = ways.Copy(files)
    kinds: dict[str, ways.Way] = {
        "copy into warm buffers": copy,
        "copy into warm buffers again": copy,
        "memmove into warm buffers": ways.Memmove(copy),
        OURS: ways.Ours(files, directory / "ours"),
        f"{OURS}, first save": ways.Ours(files, directory / "first", first=True),
        "dcp.async_save, stager kept": ways.DistributedAsync(
            files, directory / "kept", cached=True
        ),
        "dcp.async_save": ways.DistributedAsync(files, directory / "async", cached=False),
        "dcp.save": ways.Distributed(files, directory / "dcp"),
        "torch.save": ways.OneFile(files, directory / "state.pt", safetensors=False),
        "safetensors save_file": ways.OneFile(
            files, directory / "state.safetensors", safetensors=True
        ),
    }
    variants = {name: _saving(way) for name, way in kinds.items()}
    return rows_of(in_turns(variants, rounds))


def _saving(way: ways.Way) -> Callable[[], Timed]:
    return lambda: timed_save(way)


def slowdowns(files: ways.Files, directory: Path, rounds: int) -> Rows:
    """Steps beside a save; a row's ratio is that of their time to the time with nothing."""
    training = Training()
    ours = ways.Ours(files, directory / "ours")
    theirs = ways.DistributedAsync(files, directory / "kept", cached=True)
    variants: dict[str, Callable[[], Timed]] = {
        ALONE: lambda: unslowed(training),
        "CheckpointWriter": lambda: slowed(training, ours),
        "dcp.async_save, stager kept": lambda: slowed(training, theirs),
    }
    rows = {}
    for name, timings in in_turns(variants, rounds).items():
        ratios = sorted(t.wall for t in timings)
        rows[name] = {
            "ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "cpu_ratio": statistics.median(t.cpu for t in timings),
            "queued": statistics.median(t.queued for t in timings),
        }
    return rows


def show_stalls(rows: Rows) -> None:
    """Print the first table."""
    print_rows(rows, title="stall")
    print("seconds until complete")
    for name, row in rows.items():
        print(f"{name:<38}{row['complete_seconds']:.2f}")


def show_slowdowns(rows: Rows) -> None:
    """Print the second table."""
    print(
        f"\n{'steps beside a save':<30}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'no core':>9}"
    )
    for name, row in rows.items():
        quartiles = f"{row['quartile_1']:.3f}-{row['quartile_3']:.3f}"
        print(
            f"{name:<30}{row['ratio']:>8.3f}{quartiles:>16}{row['cpu_ratio']:>11.3f}"
            f"{row['queued']:>9.1%}"
        )


def file_system(directory: Path) -> str:
    """Kind of the file system that holds a directory."""
    command = ["stat", "--file-system", "--format=%T", str(directory)]
    return subprocess.check_output(command, text=True).strip()


def main() -> None:
    """Measure, print the tables, and write them if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant to be
    files = ways.make_state(*(QUICK if options.quick else FULL))
    tensors = ways.flat(files)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as name:
        directory, disk = Path(name), file_system(Path(name))
        load = os.getloadavg()[0]
        print(
            f"{datetime.now(UTC):%Y-%m-%d}: {ways.size_in_bytes(tensors) / 1e9:.2f} GB in "
            f"{len(tensors)} tensors, files on {disk}, load {load:.1f} at the beginning"
        )
        tables = {"stall": stalls(files, directory, 5 if options.quick else 7)}
        show_stalls(tables["stall"])
        tables["slowdown"] = slowdowns(files, directory, 5)
        show_slowdowns(tables["slowdown"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"most memory of the process: {peak / 1e9:.1f} GB")
    goal = Goal("stall, of a copy into warm buffers", tables["stall"][OURS]["ratio"], GOAL)
    finish(tables, [goal], options.json, file_system=disk, safetensors=safetensors.__version__)


if __name__ == "__main__":
    main()
