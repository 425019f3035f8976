"""Exchange between ranks: time that shows, bytes that are sent, and how not to do it.

    python tools/bench/sync.py [--quick] [--json FILE]

Starts itself with torchrun on 2 and on 4 gloo ranks of this machine, one thread each; with more
ranks than cores they take turns, and times say little. Three tables for each number of ranks:

- Collectives by themselves, and ``all_gather_object`` of rows of a table beside ``gather_rows``
  of the same rows: pickling a row pickles the table that it is a view of.
- The same collectives in a training step of the step benchmark's ResNet, batch 64 over all
  ranks: waited for before backward (blocking) or after it (hidden). Shares are seconds in
  ``start`` and in ``wait``, of the step without any; the median over rounds, of the worst rank.
  A rank that is early waits for the latest, which is in them, too.
- Bytes that a rank sends, beside the formula of ``bytes_on_wire``. They are counted by the kernel
  for the connections of this process (``TCP_INFO``, Linux), for the counters of the loopback
  interface are those of all programs. Repeated transmissions are left out. Headers are 52 bytes
  (IPv4, TCP with timestamps) for each segment, which is up to 64 KiB here and 1,448 bytes on
  Ethernet, where they add 4 %.

Ratios are medians over rounds of the time divided by the first row's; ``again`` is A against A.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist  # noqa: TID251
from torch.nn import functional

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale import distributed
from tools.bench._bench import Goal, Rows, finish, measure, parse, print_rows
from tools.bench._step_variants import Setting
from tools.bench._tcp_bytes import sent_by_this_process

RANKS = (2, 4)
WAIT_GOAL = 0.01
HEADER = 300
"""Bytes before a message of gloo (288, measured), and a few now and then to keep in touch."""
SETTING = Setting()
LARGE = 2_050_000
"""Floats: 8.2 MB."""
VIEWS = 8
"""Rows of a table of that size, as objects."""

Start = Callable[[], distributed.Pending]


def collectives() -> dict[str, Start]:
    """What is begun, by name. Sums of zeros stay what they are, however often they are made."""
    rows = SETTING.batch // distributed.world_size()
    features = torch.randn(rows, SETTING.dim)
    return {
        "all-reduce, 8.2 MB": _all_reduce(LARGE),
        "all-reduce, 8,000 floats": _all_reduce(8_000),
        "all-reduce, 100,000 floats": _all_reduce(100_000),
        f"gather, [{rows}, {SETTING.dim}]": lambda: distributed.start_gather(features),
    }


def _all_reduce(count: int) -> Start:
    values = torch.zeros(count)
    return lambda: distributed.start_all_reduce_sum(values)


def alone(rounds: int) -> Rows:
    """Collectives by themselves."""
    variants = {name: _to_its_end(start) for name, start in collectives().items()}
    first = next(iter(variants))
    return measure({first: variants[first], f"{first} again": variants[first]} | variants, rounds)


def _to_its_end(start: Start) -> Callable[[], object]:
    return lambda: start().wait()


def as_objects(rounds: int) -> Rows:
    """A few rows of a large table, as a tensor and as objects."""
    table = torch.randn(LARGE // SETTING.dim, SETTING.dim)
    rows = table[:VIEWS]

    def objects() -> None:
        dist.all_gather_object([None] * distributed.world_size(), list(rows))

    def tensor() -> None:
        distributed.gather_rows(rows)

    return measure(
        {
            f"gather_rows, {VIEWS} rows": tensor,
            f"gather_rows, {VIEWS} rows again": tensor,
            f"all_gather_object, {VIEWS} views": objects,
        },
        rounds,
    )


class Step:
    """A training step of the step benchmark's ResNet, with a collective in it."""

    def __init__(self, start: Start | None = None, *, hidden: bool = False) -> None:
        """Wait for what ``start`` begins after backward if ``hidden``, else before it."""
        torch.manual_seed(0)
        self._model = SETTING.model(SETTING.student_shape)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        batch, rows = SETTING.paired_batch(), SETTING.batch // distributed.world_size()
        self._inputs, self._labels = batch.student_inputs[:rows], batch.labels[:rows]
        self._start, self._hidden = start, hidden
        self.seconds: list[tuple[float, float]] = []
        """In ``start`` and in ``wait``, of each step."""

    def __call__(self) -> None:
        """One step."""
        loss = functional.cross_entropy(self._model(self._inputs).logits, self._labels)
        before = time.perf_counter()
        pending = self._start() if self._start else None
        begun = time.perf_counter()
        if self._hidden:
            loss.backward()
        waits = time.perf_counter()
        if pending is not None:
            pending.wait()
        self.seconds.append((begun - before, time.perf_counter() - waits))
        if not self._hidden:
            loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def in_a_step(rounds: int) -> Rows:
    """Collectives waited for before and after backward, beside a step without any."""
    steps = {"step": Step(), "step again": Step()}
    for name, start in collectives().items():
        for hidden in (False, True):
            steps[f"{name}, {'hidden' if hidden else 'blocking'}"] = Step(start, hidden=hidden)
    rows = measure(steps, rounds)
    whole = rows["step"]["milliseconds"] / 1000
    for name, step in steps.items():
        # The first step warmed up.
        medians = [statistics.median(part) for part in zip(*step.seconds[1:], strict=True)]
        shares = torch.tensor([medians]) / whole
        worst = distributed.gather_rows(shares).amax(0).tolist()
        rows[name] |= dict(zip(("start_share", "wait_share"), worst, strict=True))
    return rows


def wire(repeats: int) -> Rows:
    """Bytes that a rank sends for a collective; of the rank that is farthest off the formula."""
    rows = {}
    for name, start in collectives().items():
        distributed.barrier()
        before = sent_by_this_process()
        for _ in range(repeats):
            pending = start()
            pending.wait()
        after = sent_by_this_process()
        sent, segments = ((b - a) / repeats for a, b in zip(before, after, strict=True))
        formula = pending.bytes_on_wire
        found = torch.tensor([[sent, segments, sent - formula]], dtype=torch.float64)
        everywhere = distributed.gather_rows(found)
        sent, segments, over = everywhere[everywhere[:, 2].abs().argmax()].tolist()
        rows[name] = {"sent": sent, "formula": formula, "over": over, "headers": 52 * segments}
    return rows


def work(quick: bool, file: Path) -> NoReturn:
    """What each rank does, to its end; rank 0 writes the tables."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rounds = 5 if quick else 21
    tables = {
        "alone": alone(rounds),
        "objects": as_objects(3 if quick else 7),
        "step": in_a_step(rounds),
        "wire": wire(3 if quick else 20),
    }
    if distributed.is_main():
        file.write_text(json.dumps(tables))
    distributed.leave()
    distributed.end(0)


def launch(ranks: int, *, quick: bool) -> dict[str, Rows]:
    """The tables of ``ranks`` ranks of this script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as directory:
        file = Path(directory) / "tables.json"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)),
            *("--master_addr", "127.0.0.1", "--master_port", str(port)),
            *(__file__, "--json", str(file), *(["--quick"] if quick else [])),
        ]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        tables: dict[str, Rows] = json.loads(file.read_text())
    return tables


def show(ranks: int, tables: dict[str, Any]) -> None:
    """Print the tables of one number of ranks."""
    print(f"\n{ranks} ranks on {os.cpu_count()} cores")
    for title in ("alone", "objects", "step"):
        print_rows(tables[title], title=title)
    print(f"{'in a step':<38}{'start':>9}{'wait':>9}")
    for name, row in tables["step"].items():
        print(f"{name:<38}{row['start_share']:>9.2%}{row['wait_share']:>9.2%}")
    print(f"{'a rank sends':<30}{'bytes':>14}{'formula':>14}{'over':>8}{'TCP/IP':>10}")
    for name, row in tables["wire"].items():
        print(
            f"{name:<30}{row['sent']:>14,.0f}{row['formula']:>14,.0f}{row['over']:>8,.0f}"
            f"{row['headers']:>10,.0f}"
        )


def goals_of(ranks: int, tables: dict[str, Rows]) -> list[Goal]:
    """What was to be reached with so many ranks."""
    goals = [
        Goal(f"wait, share of a step, {ranks} ranks, {name}", row["wait_share"], WAIT_GOAL)
        for name, row in tables["step"].items()
        if name.endswith("hidden")
    ]
    over = max(abs(row["over"]) for row in tables["wire"].values())
    # A ring sends 2 (W - 1) messages for a sum, or twice as many halves.
    return [*goals, Goal(f"bytes off the formula, {ranks} ranks", over, 4 * (ranks - 1) * HEADER)]


def main() -> None:
    """Start the ranks, print their tables, and write them if asked."""
    options = parse(__doc__)
    if "LOCAL_RANK" in os.environ:
        work(options.quick, options.json)
    torch.set_num_threads(1)
    rows, goals = {}, []
    for ranks in RANKS:
        tables = launch(ranks, quick=options.quick)
        show(ranks, tables)
        rows[f"{ranks} ranks"] = tables
        goals += goals_of(ranks, tables)
    finish(rows, goals, options.json)


if __name__ == "__main__":
    main()
