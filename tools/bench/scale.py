"""What alignment costs as classes, prototypes and ranks grow.

    python tools/bench/scale.py [--quick] [--json FILE] [--plot FILE] [--build FILE]

One thread, batch 64, 128 features. Alignment is what a step of the student does for it: targets,
their losses, the exchange, backward to the student's features, logits and head, and the
potentials. The unit is the cross-entropy step of the step benchmark's network, which is not in
it. A ratio is the median over rounds, to the first row; ``again`` is A against A. Five steps are
timed as one, in warm caches: ``step.py`` has the cost in its place, after the network's forward
pass. ``growth`` is CPU time over that of the table's first row of alignment.

- classes, 16 prototypes each, class-masked; beyond 256 classes soft labels list 256. ``transport
  alone`` is without soft labels and the teacher's head, whose terms are over all classes as
  cross-entropy is: ``cross-entropy head`` is that product and loss by itself.
- prototypes, of 100 classes: class-masked, label-free over all, label-free by a search of 64.
  Its index takes up the potentials every 100 steps: ``refresh`` is such a step, ``amortised``
  the mean over 100. ``captured`` is the mass that the search holds, as the transport measures
  it; ``cosine`` is of its gradient and the float64 one over all prototypes.
- ranks of this machine (gloo) at the same global batch: each one's part, in its own unit, the
  worst rank's. With more ranks than cores they take turns, and times say little.

``--build`` takes the JSON of ``build_scale.py`` and draws it beside the classes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench._bench import Goal, Rows, finish, print_rows
from tools.bench._scale_alignment import (
    ALL,
    MASKED,
    REFRESH_STEPS,
    SEARCHED,
    TRANSPORT,
    Alignment,
    Step,
    head_step,
    in_units,
    search_quality,
)
from tools.bench._scale_memory import Features, synthetic_memory
from tools.bench._scale_plot import plot
from tools.bench._scale_ranks import launch, work
from tools.bench._step_variants import Setting

CLASSES = [100, 1000, 5000, 21_000]
PER_CLASS = 16
PROTOTYPES = [1000, 10_000, 100_000, 1_000_000]
EPSILONS = (0.02, 0.1)
RANKS = (1, 2, 4)
AGREEMENT = 1e-5
TRANSPORT_GROWTH, BYTES_SHARE, COSINE = 2.0, 0.05, 0.99


def by_classes(setting: Setting, sizes: list[int], rounds: int) -> Rows:
    """Class-masked alignment, its transport alone, and the head's cross-entropy."""
    whole: dict[str, Step] = {}
    alone: dict[str, Step] = {}
    heads: dict[str, Step] = {}
    for classes in sizes:
        features = Features.of(classes, setting.dim)
        memory = synthetic_memory(features, PER_CLASS)
        name, batch = f"{classes:,} classes", setting.batch
        whole[name] = Alignment(features, memory, MASKED, batch=batch)
        alone[f"{name}, transport alone"] = Alignment(
            features, memory, MASKED, batch=batch, weights=TRANSPORT
        )
        heads[f"{name}, cross-entropy head"] = head_step(classes, setting.dim, batch)
    return in_units(setting, {**whole, **alone, **heads}, rounds)


def by_prototypes(setting: Setting, prototypes: int, rounds: int) -> Rows:
    """The three ways over one number of prototypes, and what a search keeps."""
    features = Features.of(setting.classes, setting.dim)
    memory = synthetic_memory(features, prototypes // setting.classes)
    masked, dense = (
        Alignment(features, memory, options, batch=setting.batch) for options in (MASKED, ALL)
    )
    begun = time.process_time()
    searched = Alignment(features, memory, SEARCHED, batch=setting.batch)
    built = time.process_time() - begun
    steps: dict[str, Step] = {
        "class-masked": masked,
        "label-free, all": dense,
        "label-free, search": searched,
        "label-free, search, refresh": searched.refresh,
    }
    rows = in_units(setting, steps, rounds)
    row, refresh = rows["label-free, search"], rows["label-free, search, refresh"]
    for column in ("cpu_ratio", "cpu_milliseconds"):
        once = (refresh[column] - row[column]) / REFRESH_STEPS
        row[f"amortised_{column}"] = row[column] + once
    row["seconds_to_build"] = built
    for epsilon in EPSILONS:
        quality = search_quality(searched, memory, epsilon)
        row |= {f"{name}_at_{epsilon}": value for name, value in quality.items()}
    return rows


def by_ranks(quick: bool) -> dict[str, Rows]:
    """Tables of each number of ranks; the first row's ``apart`` is from one rank's potentials."""
    tables: dict[str, Rows] = {}
    alone: list[float] = []
    for ranks in RANKS:
        found = launch(ranks, Path(__file__), quick=quick)
        alone = alone or found["potentials"]
        apart = torch.tensor(found["potentials"]) - torch.tensor(alone)
        tables[f"{ranks} ranks"] = found["rows"]
        found["rows"]["ce_ls"]["apart"] = float(apart.abs().max())
    return tables


def show(title: str, rows: Rows) -> None:
    """Print a table; what is not a time follows in a line a row."""
    timed = {"ratio", "quartile_1", "quartile_3", "cpu_ratio", "milliseconds"}
    print()
    print_rows(rows, title=title)
    for name, row in rows.items():
        rest = (f"{column} {value:.4g}" for column, value in row.items() if column not in timed)
        if line := ", ".join(rest):
            print(f"  {name}: {line}", flush=True)


def goals_of(tables: dict[str, Rows]) -> Iterator[Goal]:
    """What growth should leave as it is."""
    alone = [row for name, row in tables["classes"].items() if name.endswith("transport alone")]
    growth = alone[-1]["growth"] / alone[0]["growth"]
    yield Goal("transport alone, growth with classes", growth, TRANSPORT_GROWTH)
    for title, rows in tables.items():
        if title.endswith("prototypes"):
            cosine = rows["label-free, search"][f"cosine_at_{EPSILONS[0]}"]
            yield Goal(f"cosine of a search, {title}", cosine, COSINE, at_least=True)
        if title.endswith("ranks") and title != "1 ranks":
            yield Goal(f"potentials apart, {title}", rows["ce_ls"]["apart"], AGREEMENT)
            share = rows["8,000 prototypes"]["bytes_of_gradients"]
            yield Goal(f"bytes of gradients', 8,000 prototypes, {title}", share, BYTES_SHARE)


def options_of() -> argparse.Namespace:
    """Those of every benchmark, the plot, and what is drawn in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="docs/images/scale.png, say")
    parser.add_argument("--build", type=Path, metavar="FILE", help="JSON of build_scale.py")
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, write and draw them if asked."""
    options = options_of()
    setting, rounds = Setting(), 5 if options.quick else 15
    if "LOCAL_RANK" in os.environ:
        work(setting, rounds, options.json)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    tables: dict[str, Any] = {
        "classes": by_classes(setting, CLASSES[:2] if options.quick else CLASSES, rounds)
    }
    show("classes", tables["classes"])
    for prototypes in PROTOTYPES[:2] if options.quick else PROTOTYPES:
        title = f"{prototypes:,} prototypes"
        fewer = rounds // 3 if prototypes == PROTOTYPES[-1] else rounds
        tables[title] = by_prototypes(setting, prototypes, fewer)
        show(title, tables[title])
    for title, rows in by_ranks(options.quick).items():
        tables[title] = rows
        show(f"{title} on {os.cpu_count()} cores", rows)
    finish(tables, list(goals_of(tables)), options.json, faiss=faiss.__version__)
    if options.plot:
        build = json.loads(options.build.read_text())["rows"] if options.build else {}
        plot(options.plot, tables, build)


if __name__ == "__main__":
    main()
