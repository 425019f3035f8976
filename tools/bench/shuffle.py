"""How well samples are mixed, beside webdataset's shuffle buffer and a uniform permutation.

    python tools/bench/shuffle.py [--quick] [--samples N] [--plot FILE] [--json FILE]

Orders of 1,000,000 samples that are stored in 1,000 shards, sorted by class (1,000 classes);
only numbers move, nothing is read. webdataset shuffles the shards, then samples in a buffer of
10,000, both by its own code. Of the batches of 256 in an epoch:

- same shard: chance that two samples of a batch are of one shard;
- class distance: total variation between the classes of a batch and those of the data;
- met again: chance that two samples of a batch of one epoch are within 256 positions of each
  other in the next, hence how much epochs differ.

Each is divided by its value for a uniform permutation (1 is ideal). The row ``uniform again``
is another uniform permutation: its distance from 1 is the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmkd_scale.data.order import POOL, Order
from cmkd_scale.data.quality import same_shard
from cmkd_scale.data.sampling import Natural

BATCH, BUFFER = 256, 10_000
WINDOW = 20_000  # positions that are plotted
BUFFERED = "webdataset, buffer of 10,000"

Ints = NDArray[np.int64]
Epoch = Callable[[int], Ints]


class Stored:
    """Samples 0 .. N - 1, shard after shard, class after class."""

    def __init__(self, samples: int, shards: int) -> None:
        """As many classes as shards, so that a shard holds one."""
        self.samples = samples
        self.shards = shards

    def shard(self, places: Ints) -> Ints:
        """The shard, and the class, of each place."""
        return places * self.shards // self.samples

    @property
    def starts(self) -> Ints:
        """[shards + 1] first place of each shard, and the end."""
        return -(-np.arange(self.shards + 1) * self.samples // self.shards)


def ours(data: Stored) -> Epoch:
    """The order of the package."""
    order = Order(Natural(data.samples), data.starts, seed=0)

    def epoch(number: int) -> Ints:
        first = number * data.samples
        parts = [
            order.places(np.arange(start, min(start + 8192, first + data.samples)))
            for start in range(first, first + data.samples, 8192)
        ]
        return np.concatenate(parts)

    return epoch


def webdataset_buffer(data: Stored) -> Epoch:
    """webdataset's own shuffling, of shards and then in a buffer.

    Raises:
        ImportError: webdataset is not installed.
    """
    from webdataset.filters import _shuffle

    starts = data.starts.tolist()

    def epoch(number: int) -> Ints:
        # A list of shards that fits the buffer: `WebDataset(shardshuffle=len(urls))`.
        shards = _shuffle(iter(range(data.shards)), data.shards, data.shards, seed=2 * number)
        stored = (place for shard in shards for place in range(starts[shard], starts[shard + 1]))
        mixed: Iterator[int] = _shuffle(stored, BUFFER, BUFFER, rng=random.Random(2 * number + 1))
        return np.fromiter(mixed, dtype=np.int64, count=data.samples)

    return epoch


def uniform(data: Stored, seed: int) -> Epoch:
    """What every shuffle wants to be."""
    return lambda number: np.random.default_rng([seed, number]).permutation(data.samples)


def batches(data: Stored, order: Ints) -> Ints:
    """[batches, BATCH] shard, or class, of each sample of the full batches."""
    return data.shard(order[: len(order) // BATCH * BATCH]).reshape(-1, BATCH)


def class_distance(data: Stored, order: Ints) -> float:
    """Mean total variation distance of a batch's classes from the data's."""
    whole = np.diff(data.starts) / data.samples
    distances = [
        np.abs(np.bincount(row, minlength=data.shards) / BATCH - whole).sum() / 2
        for row in batches(data, order)
    ]
    return float(np.mean(distances))


def met_again(data: Stored, first: Ints, second: Ints) -> float:
    """Chance that two samples of a batch of ``first`` are within BATCH positions in ``second``."""
    position = np.empty(data.samples, dtype=np.int64)
    position[second] = np.arange(data.samples)
    rows = np.sort(position[first[: len(first) // BATCH * BATCH]].reshape(-1, BATCH), axis=1)
    # Sorted: later samples that are at most BATCH positions on. Rows are laid far apart.
    apart = rows + (2 * data.samples * np.arange(len(rows)))[:, None]
    flat = apart.ravel()
    near = np.searchsorted(flat, flat + BATCH, side="right") - np.arange(len(flat)) - 1
    return float(near.sum() / (len(rows) * BATCH * (BATCH - 1) / 2))


def shards_in_use(data: Stored, order: Ints) -> float:
    """Median number of shards at a time that are between their first and their last sample."""
    shards = data.shard(order)
    first, last = np.full(data.shards, len(order)), np.full(data.shards, -1)
    np.minimum.at(first, shards, np.arange(len(order)))
    np.maximum.at(last, shards, np.arange(len(order)))
    changes = np.bincount(first, minlength=len(order) + 1)
    changes -= np.bincount(last + 1, minlength=len(order) + 1)
    return float(np.median(np.cumsum(changes)[:-1]))


def measure(data: Stored, orders: dict[str, Epoch]) -> dict[str, dict[str, float]]:
    """All measures of all orders; the first one is the ideal that the others are divided by."""
    table: dict[str, dict[str, float]] = {}
    ideal: dict[str, float] = {}
    for name, epoch in orders.items():
        begin = time.process_time()
        first, second = epoch(0), epoch(1)
        seconds = time.process_time() - begin
        found = {
            "same shard": same_shard(batches(data, first)),
            "class distance": class_distance(data, first),
            "met again": met_again(data, first, second),
        }
        ideal = ideal or found
        table[name] = {what: value / ideal[what] for what, value in found.items()}
        table[name]["shards in use"] = shards_in_use(data, first)
        table[name]["CPU us a sample"] = 1e6 * seconds / (2 * data.samples)
    return table


def plot(file: Path, panels: dict[str, tuple[Ints, float]], data: Stored) -> None:
    """Where the samples of the first WINDOW positions are stored; titles name the first measure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = min(WINDOW, data.samples // 5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 4), sharey=True)
    for axis, (name, (order, ratio)) in zip(axes, panels.items(), strict=True):
        axis.plot(order[:window], ".", markersize=0.9, color="#1f4e79")
        axis.set_title(f"{name}\nsame shard in a batch: {ratio:,.2f} x uniform", fontsize=11)
        axis.set_xlim(0, window)
        axis.set_ylim(0, data.samples)
        axis.set_xlabel("position in the epoch")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("place in the stored data, sorted by class")
    figure.tight_layout(w_pad=2.5)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Measure, print the table, and write it and the plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="200,000 samples in 200 shards")
    parser.add_argument("--samples", type=int, metavar="N", help="in shards of 1,000")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="docs/images/shuffle.png, say")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    samples = options.samples or (200_000 if options.quick else 1_000_000)
    data = Stored(samples, shards=-(-samples // 1000))
    orders = {
        "uniform permutation": uniform(data, 0),
        "uniform again": uniform(data, 1),
        "ours": ours(data),
    }
    try:
        orders[BUFFERED] = webdataset_buffer(data)
    except ImportError:
        print("webdataset: not installed")
    rows = measure(data, orders)
    columns = list(rows["ours"])
    print(f"{'over a uniform permutation':<30}" + "".join(f"{what:>22}" for what in columns))
    for name, row in rows.items():
        print(f"{name:<30}" + "".join(f"{row[what]:>22.3f}" for what in columns))
    print(f"samples drawn from at a time: ours {min(POOL, samples):,}, the buffer {BUFFER:,}")
    print(f"samples held in memory to shuffle: ours 0, the buffer {BUFFER:,}")
    goals = []
    if BUFFERED in rows:
        value, goal = rows["ours"]["same shard"], rows[BUFFERED]["same shard"]
        goals.append({"name": "same shard", "value": value, "goal": goal, "met": value <= goal})
        print(f"goal same shard: {value:.3f} <= {goal:.3f} (webdataset's) met: {value <= goal}")
    if options.plot:
        names = [name for name in orders if name != "uniform again"]
        panels = {name: (orders[name](0), rows[name]["same shard"]) for name in reversed(names)}
        plot(options.plot, panels, data)
    if options.json:
        environment = {"numpy": np.__version__, "machine": platform.processor()}
        found: dict[str, Any] = {"rows": rows, "goals": goals, "environment": environment}
        options.json.write_text(json.dumps({**found, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
