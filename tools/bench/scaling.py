"""The whole training loop on 1, 2 and 4 ranks, beside torch's DDP in a loop of a few lines.

    python tools/bench/scaling.py [--quick] [--json FILE]

Starts itself with torchrun on gloo ranks of this machine, one thread each; with more ranks than
cores they take turns. A ResNet on log-mels, cross-entropy, 128 samples a step over all ranks, held
in memory. ``Trainer`` is what ``cmkd student`` runs: engine, step loop, agreement of the ranks
after each step, watchdog, log to a file. The bare loop has the same model, batches, fused AdamW,
schedule and clipping; DDP is around the model if there are several ranks. A run is a number of
steps, of which whole turns of the loop are timed; no checkpoint falls into them.

Seconds are of the slowest rank, CPU seconds of all ranks together. Ratios are medians over rounds,
taken in turns; ``again`` is A against A, the noise. ``speedup`` is the step of one rank over that
of so many; where ranks are more than cores, it cannot exceed the cores.

The losses of the first 20 steps of ``Trainer`` are compared with the bare loop's and, on 2 and 4
ranks, with those on 1: the same batch gives the same training, however it is spread. Sums in
another order differ by rounding, which training magnifies from step to step; with a model in
float64 (losses are float32 always) little of that is left, while a wrong split would stay.
"""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale import distributed
from cmkd_scale.config_sections import TrainConfig
from cmkd_scale.training.engine import Engine
from tools.bench._bench import Goal, Rows, finish, parse
from tools.bench._scaling_loops import Bare, Ours
from tools.bench._step_variants import Setting

RANKS = (1, 2, 4)
OVERHEAD = 1.03
LOSSES_APART = 1e-5
FULL = Setting(width=32, depth=1, batch=128)
QUICK = Setting(width=16, depth=1, batch=64)
FOLLOWED_STEPS = 20
BARE, OURS, OURS_64 = "bare DDP loop", "Trainer", "Trainer, float64 model"

Loop = Callable[[TrainConfig], tuple[float, float]]
"""Makes a run; seconds and CPU seconds a step of this process."""


def train_config(setting: Setting, steps: int, *, log_every: int) -> TrainConfig:
    """Of a run."""
    return TrainConfig(
        steps=steps,
        global_batch_size=setting.batch,
        learning_rate=1e-3,
        warmup_steps=5,
        log_every_steps=log_every,
        checkpoint_every_steps=steps,
        keep_checkpoints=1,
    )


def work(setting: Setting, rounds: int, steps: int, file: Path) -> NoReturn:
    """What each rank does, to its end; rank 0 writes rows and losses."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as directory:
        engine = Engine()
        followed = train_config(setting, FOLLOWED_STEPS, log_every=1)
        exact = Ours(engine, setting, Path(directory) / "float64", dtype=torch.float64)
        losses = {OURS_64: exact.run(followed)}
        ours, bare = Ours(engine, setting, Path(directory) / "float32"), Bare(setting)
        losses |= {OURS: ours.run(followed), BARE: mean_over_ranks(bare.run(followed))}
        loops: dict[str, Loop] = {BARE: bare, f"{BARE} again": bare, OURS: ours}
        rows = in_turns(loops, train_config(setting, steps, log_every=10), rounds)
        if distributed.is_main():
            file.write_text(json.dumps({"rows": rows, "losses": losses}))
        distributed.barrier()
    distributed.leave()
    distributed.end(0)


def mean_over_ranks(losses: torch.Tensor) -> list[float]:
    """Of the global batch, whose parts are equally large; a collective call."""
    means: list[float] = (distributed.all_reduce_sum(losses) / distributed.world_size()).tolist()
    return means


def in_turns(loops: dict[str, Loop], config: TrainConfig, rounds: int) -> Rows:
    """Time every loop once a round, after one that warms up, beside the first; collective."""
    wall: dict[str, list[float]] = {name: [] for name in loops}
    cpu: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        # The order, the same on all ranks, is drawn: a run ends with a write, which the next feels.
        for name in random.Random(turn).sample(list(loops), len(loops)):
            distributed.barrier()
            mine = torch.tensor([loops[name](config)], dtype=torch.float64)
            everyone = distributed.gather_rows(mine)
            wall[name].append(float(everyone[:, 0].max()))
            cpu[name].append(float(everyone[:, 1].sum()))
    base = next(iter(loops))
    return {
        name: row(wall[name][1:], cpu[name][1:], wall[base][1:], cpu[base][1:]) for name in loops
    }


def row(
    wall: list[float], cpu: list[float], base_wall: list[float], base_cpu: list[float]
) -> dict[str, float]:
    """Medians of a loop, as ratios to the first one in the same round."""
    ratios = sorted(mine / base for mine, base in zip(wall, base_wall, strict=True))
    cpu_ratios = [mine / base for mine, base in zip(cpu, base_cpu, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "quartile_1": ratios[len(ratios) // 4],
        "quartile_3": ratios[3 * len(ratios) // 4],
        "cpu_ratio": statistics.median(cpu_ratios),
        "milliseconds": 1000 * statistics.median(wall),
        "cpu_milliseconds": 1000 * statistics.median(cpu),
    }


def farthest(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two rows of losses."""
    pairs = zip(losses, reference, strict=True)
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)


def launch(ranks: int, script: Path, *, quick: bool) -> dict[str, Any]:
    """What ``ranks`` ranks of ``script`` found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as directory:
        file = Path(directory) / "found.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            *(str(script), "--json", str(file), *(["--quick"] if quick else [])),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, env=environment, check=True)
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def show(name: str, found: dict[str, Any], alone: float) -> None:
    """Print the rows of one number of ranks."""
    print(
        f"\n{name:<28}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'ms':>9}{'cpu ms':>9}"
        f"{'speedup':>9}"
    )
    for loop, values in found["rows"].items():
        quartiles = f"{values['quartile_1']:.3f}-{values['quartile_3']:.3f}"
        print(
            f"{loop:<28}{values['ratio']:>8.3f}{quartiles:>16}{values['cpu_ratio']:>11.3f}"
            f"{values['milliseconds']:>9.1f}{values['cpu_milliseconds']:>9.1f}"
            f"{alone / values['milliseconds']:>9.2f}"
        )
    for what, value in found["apart"].items():
        print(f"losses apart, {what}: {value:.1e}")


def compare(tables: dict[str, dict[str, Any]]) -> None:
    """Add to each number of ranks how far its losses are from the others'."""
    alone = tables["1 ranks"]["losses"]
    for found in tables.values():
        losses = found["losses"]
        found["apart"] = {
            f"{OURS} and {BARE}": farthest(losses[OURS], losses[BARE]),
            f"{OURS} and one rank": farthest(losses[OURS], alone[OURS]),
            f"{OURS_64} and one rank": farthest(losses[OURS_64], alone[OURS_64]),
        }


def goals_of(tables: dict[str, dict[str, Any]]) -> list[Goal]:
    """What was to be reached."""
    goals = []
    for name, found in tables.items():
        goals.append(Goal(f"{OURS} over {BARE}, {name}", found["rows"][OURS]["ratio"], OVERHEAD))
    for loop in (OURS, OURS_64):
        worst = max(found["apart"][f"{loop} and one rank"] for found in tables.values())
        goals.append(Goal(f"losses of {loop}, number of ranks", worst, LOSSES_APART))
    return goals


def main() -> None:
    """Start the ranks, print their tables, and write them if asked."""
    options = parse(__doc__)
    if "LOCAL_RANK" in os.environ:
        setting, rounds, steps = (QUICK, 5, 6) if options.quick else (FULL, 15, 6)
        work(setting, rounds, steps, options.json)
    torch.set_num_threads(1)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    tables = {
        f"{ranks} ranks": launch(ranks, Path(__file__), quick=options.quick) for ranks in RANKS
    }
    compare(tables)
    for name, found in tables.items():
        show(name, found, tables["1 ranks"]["rows"][BARE]["milliseconds"])
    finish(tables, goals_of(tables), options.json, accelerate=accelerate.__version__)


if __name__ == "__main__":
    main()
