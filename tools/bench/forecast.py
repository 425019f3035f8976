"""Does ``cmkd predict-transfer`` know which teachers help? Forecasts beside what came of them.

    python tools/bench/forecast.py [--out DIR] [--fsdd DIR] [--seeds N] [--jobs N] [--json FILE]
                                   [--plot FILE] [--quick]

Pairs of a teacher and a student task, those without any shared structure among them: directions
between pictures, speech and text, 1 to 50 labels a class, digits, and teachers that are permuted,
random or orthogonal. Each pair's gain is the accuracy of ``ucmkd_global`` without its guard over
``ce_ls``, a mean over seeds; students are those of ``accuracy.py`` and live in the same ``--out``,
where what is there is read and what is missing is trained. Each forecast comes from a student that
has never met the teacher, and from held-out samples that are not those of the gain. Prints the
pairs, and how the forecast ranks them when its factor is fitted to all other pairs (leave one
out).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.config import with_changes
from cmkd_scale.diagnostics.forecast import GAIN, SPREAD
from cmkd_scale.files import read_json, write_atomically
from cmkd_scale.memory.bank import load_memory, save_memory
from cmkd_scale.memory.controls import apply_control
from cmkd_scale.monitoring.report_style import COLOURS, GRID, INK, make_figure, styled, to_png
from cmkd_scale.stages.predict_transfer import FILE, predict_transfer
from tools.bench._accuracy_runs import items_of, remember, teachers_of, train_all
from tools.bench._accuracy_setting import Item, Setting
from tools.bench._accuracy_tasks import BASELINE, OURS, Row, Task, make_tasks
from tools.bench._bench import Goal, finish

QUICK_STEPS = 100
LEAST_PAIRS = 8
WANTED = 0.8
_NEAR = 4.0  # points from no gain, predicted and real: no name beside the dot
COVERED = 0.9  # of the pairs lie within the interval


class Pair(NamedTuple):
    """A teacher, real or a control, and a student's task."""

    task: Task
    control: str = "none"

    @property
    def name(self) -> str:
        """For people and directories."""
        end = "" if self.control == "none" else f"-{self.control}"
        return f"{self.task.name}{end}"

    @property
    def rows(self) -> tuple[Row, Row]:
        """The student with and without that teacher."""
        return Row(OURS, self.control, guarded=False), Row(BASELINE)


def all_pairs(speech: bool, quick: bool = False) -> list[Pair]:
    """The pairs; a quick run takes two."""
    main = make_tasks("numbers", shots=[3], directions=["image-audio"])
    if quick:
        return [Pair(main[0]), Pair(main[0], "permuted")]
    others = [task for task in make_tasks("numbers", shots=[3]) if task.name != main[0].name]
    shots = make_tasks("numbers", shots=[1, 10, 50], directions=["image-audio"])
    digits = make_tasks("digits", speech=speech)
    pairs = [Pair(task) for task in (*main, *shots, *others, *digits)]
    return [*pairs, *(Pair(main[0], name) for name in ("permuted", "random", "orthogonal"))]


def accuracy_of(setting: Setting, item: Item) -> float:
    """Of a finished student."""
    results = read_json(setting.out / "students" / item.name / "results.json")
    return float(results["metrics"]["test/accuracy"])


def gain_of(setting: Setting, pair: Pair, seeds: Sequence[int]) -> float:
    """What the teacher brought, mean over seeds."""
    taught, plain = pair.rows
    return statistics.fmean(
        accuracy_of(setting, Item(pair.task, taught, seed))
        - accuracy_of(setting, Item(pair.task, plain, seed))
        for seed in seeds
    )


def students_of(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs by their student's task: one training without a teacher serves them all."""
    groups: dict[tuple[str, str, int], list[Pair]] = {}
    for pair in pairs:
        task = pair.task
        groups.setdefault((task.suite, task.student, task.shots), []).append(pair)
    return list(groups.values())


def memory_of(setting: Setting, pair: Pair, seed: int) -> Path:
    """The pair's memory: of its teacher, or of a control that is made from it."""
    source = pair.task.teachers[0]
    remember(setting, source)
    kept = setting.out / "memories" / source
    if pair.control == "none":
        return kept
    file = setting.out / "memories" / f"{source}-{pair.control}-seed{seed}.safetensors"
    memory = load_memory(kept)
    save_memory(apply_control(memory, pair.control, seed, memory.class_names), file)
    return file


def forecast_of(setting: Setting, group: Sequence[Pair], seed: int) -> dict[str, dict[str, Any]]:
    """What is forecast for each pair of a student's, by name."""
    torch.set_num_threads(1)
    memories = {pair.name: memory_of(setting, pair, seed) for pair in group}
    directory = setting.out / "forecasts" / f"{group[0].name}-seed{seed}"
    if not (directory / FILE).exists():
        item = Item(group[0].task, group[0].rows[0], seed)
        config = setting.config(item, teachers_of(setting, item))
        predict_transfer(
            with_changes(config, {"run.dir": str(directory)}),
            list(memories.values()),
            console=False,
        )
    rows = {row["memory"]: row for row in read_json(directory / FILE)["candidates"]}
    return {name: rows[str(memory)] for name, memory in memories.items()}


def forecasts_of(
    setting: Setting, pairs: Sequence[Pair], seeds: Sequence[int], jobs: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """What is forecast for each pair, seed by seed, in ``jobs`` processes."""
    work = [(group, seed) for group in students_of(pairs) for seed in seeds]
    groups, each_seed = zip(*work, strict=True)
    found: dict[str, list[dict[str, Any]]] = {pair.name: [] for pair in pairs}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(forecast_of, repeat(setting), groups, each_seed):
            for name, row in rows.items():
                found[name].append(row)
    return found


def fitted(scores: np.ndarray[Any, Any], gains: np.ndarray[Any, Any]) -> float:
    """The constant that makes gains of scores, by least squares."""
    return float(scores @ gains / max(float(scores @ scores), 1e-12))


def leave_one_out(scores: np.ndarray[Any, Any], gains: np.ndarray[Any, Any]) -> list[float]:
    """Each pair's gain as predicted from all others."""
    every = np.arange(len(gains))
    return [
        float(scores[i] * fitted(scores[every != i], gains[every != i])) for i in every.tolist()
    ]


def rank_correlation(predicted: Sequence[float], gains: Sequence[float]) -> float:
    """Spearman's; 0 where one side says the same of all."""
    if len(set(predicted)) < 2 or len(set(gains)) < 2:
        return 0.0
    return float(spearmanr(predicted, gains).statistic)


def measure(
    setting: Setting, pairs: Sequence[Pair], seeds: Sequence[int], jobs: int = 1
) -> dict[str, Any]:
    """Every pair with its gain and its forecast, and how they fit."""
    students = [
        item for pair in pairs for item in items_of([replace(pair.task, rows=pair.rows)], seeds)
    ]
    train_all(setting, students, jobs)
    told = forecasts_of(setting, pairs, seeds, jobs)
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        seen = told[pair.name]
        agreements = [row["agreement"] or {"z": 0.0, "correlation": 0.0} for row in seen]
        rows.append(
            {
                "name": pair.name,
                "gain": gain_of(setting, pair, seeds),
                "score": statistics.fmean(row["trial"]["gain"] for row in seen),
                "error": statistics.fmean(row["trial"]["error"] for row in seen),
                "correlation": statistics.fmean(one["correlation"] for one in agreements),
                "z": statistics.fmean(one["z"] for one in agreements),
            }
        )
    scores = np.array([row["score"] for row in rows])
    gains = np.array([row["gain"] for row in rows])
    for row, predicted in zip(rows, leave_one_out(scores, gains), strict=True):
        row["predicted"] = predicted
    errors = np.abs(np.array([row["predicted"] for row in rows]) - gains)
    return {
        "pairs": rows,
        "spearman": rank_correlation([row["predicted"] for row in rows], gains.tolist()),
        "constant": fitted(scores, gains),
        "spread": float(np.quantile(errors, COVERED)),
    }


def markdown(found: dict[str, Any]) -> str:
    """The pairs for people, the largest gain first; in points."""
    lines = [
        "| pair | gain | predicted | heads' gain | its error | structures agree | above chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(found["pairs"], key=lambda row: -row["gain"]):
        points = f"{100 * row['gain']:+.1f} | {100 * row['predicted']:+.1f}"
        heads = f"{100 * row['score']:+.1f} | {100 * row['error']:.1f}"
        agree = f"{row['correlation']:.2f} | {row['z']:.1f} sd"
        lines.append(f"| {row['name']} | {points} | {heads} | {agree} |")
    lines.append("")
    lines.append(
        f"Leave one out: Spearman {found['spearman']:.2f} over {len(found['pairs'])} pairs; "
        f"factor {found['constant']:.2f} (the program's: {GAIN:g}), {COVERED:.0%} within "
        f"{100 * found['spread']:.1f} points (the program's: {100 * SPREAD:g})."
    )
    return "\n".join(lines)


def write_plot(found: dict[str, Any], file: Path) -> None:
    """Draw what was predicted against what came of it."""
    gains = [100 * row["gain"] for row in found["pairs"]]
    predicted = [100 * row["predicted"] for row in found["pairs"]]
    ends = [min(*gains, *predicted) - 2, max(*gains, *predicted) + 2]
    with styled():
        figure, (ax,) = make_figure(4.2, 1)
        ax.plot(ends, ends, color=GRID, linewidth=1)
        spread = 100 * found["spread"]
        low, high = ([end + side * spread for end in ends] for side in (-1, 1))
        ax.fill_between(ends, low, high, color=GRID, alpha=0.4)
        ax.plot(predicted, gains, "o", color=COLOURS[1], markersize=5, mew=0)
        for row, x, y in zip(found["pairs"], predicted, gains, strict=True):
            if max(abs(x), abs(y)) > _NEAR:  # the others lie on each other
                name = row["name"].removeprefix("numbers-")
                # On the side where no other dot is in the way.
                side = -1 if _in_the_way(x, y, predicted, gains) else 1
                ax.annotate(
                    name, (x, y), (5 * side, 2), textcoords="offset points", fontsize=6,
                    ha="left" if side > 0 else "right",
                )  # fmt: skip
        ax.axhline(0, color=INK, linewidth=0.6)
        ax.set_xlabel("predicted gain, points (each pair from all others)")
        ax.set_ylabel("gain over ce_ls, points")
        title = f"Spearman {found['spearman']:.2f} over {len(gains)} pairs"
        ax.set_title(title, loc="left", fontsize=9, color=INK)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, to_png(figure))


def _in_the_way(x: float, y: float, others_x: Sequence[float], others_y: Sequence[float]) -> bool:
    """Whether a name to the right of (x, y) would lie on a dot."""
    width, height = 12.0, 2.5  # of a name, in points of accuracy
    return any(
        x < other < x + width and abs(above - y) < height
        for other, above in zip(others_x, others_y, strict=True)
    )


def main() -> None:
    """Run, print the pairs, write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/accuracy[-quick]")
    parser.add_argument("--fsdd", type=Path, metavar="DIR", help="recordings; else synthesised")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="two pairs, one seed, few steps")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or Path("runs") / ("accuracy-quick" if given.quick else "accuracy")
    setting = Setting(out, given.fsdd, {"train.steps": QUICK_STEPS} if given.quick else {})
    pairs = all_pairs(given.fsdd is not None, given.quick)
    found = measure(setting, pairs, range(1 if given.quick else given.seeds), given.jobs)
    print(markdown(found))
    if given.plot is not None:
        write_plot(found, given.plot)
    name = f"Spearman, leave one out, over {len(pairs)} pairs ({LEAST_PAIRS} wanted)"
    finish(found, [Goal(name, found["spearman"], WANTED, at_least=True)], given.json)


if __name__ == "__main__":
    main()
