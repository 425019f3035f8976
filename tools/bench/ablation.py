"""Which parts of ``ucmkd_global`` matter: students on real speech, each with one part changed.

    python tools/bench/ablation.py [--fsdd DIR] [--out DIR] [--seeds 0 1 2] [--quick]
                                   [--json FILE] [--plot FILE]

Students, teacher and data are those of ``cmkd quickstart``: handwriting teaches speech, three
labelled clips of each of 100 numbers, unseen speakers, a fold for each seed; without ``--fsdd``
the speech is synthesised. All rows learn from one teacher of seed 0. Each is compared with
``ucmkd_global`` clip by clip (``_ablation_statistics``); the row ``... again`` is equal to it but
for rounding, so what it differs by is the noise of training. Rows with shifted labels train on 1
to 10 clips of a class and have a reference of their own.

Every student is a run directory below ``--out``; started again, the tool reads those that are
finished and continues the rest. 29 rows of 3 seeds take about 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.config import Config, make_config, with_changes
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.quickstart import CLIPS_PER_CLASS, COUNTS
from cmkd_scale.stages.quickstart import _config as quickstart_config
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tools.bench._ablation_minibatch import minibatch_transport, teacher_features
from tools.bench._ablation_plot import write_plot
from tools.bench._ablation_rows import QUICK, REFERENCE, ROWS, RULE, Row, known_methods
from tools.bench._ablation_shift import build_shifted
from tools.bench._ablation_statistics import Correct, compare
from tools.bench._bench import Goal, finish
from tools.bench._students import is_finished, recognised

QUICK_STEPS = 100


@dataclass(frozen=True, slots=True)
class Setting:
    """Where runs live and what they have in common."""

    out: Path
    fsdd: Path | None
    changes: dict[str, Any]
    """Dotted keys of every config -> values."""

    def config(self, row: Row, seed: int, memory_run: Path) -> Config:
        """The student of a row."""
        name = row.name.replace(", ", "-").replace("/", "-").replace(" ", "_").replace("'", "")
        usual = quickstart_config(
            self.out / f"{name}-seed{seed}",
            seed,
            "audio",
            memory_run,
            row.method,
            row.control,
            self.fsdd,
            n_per_class=CLIPS_PER_CLASS,
        )
        # Every part is judged by itself; the guard would leave wrong teachers out.
        changes = {"method.guard": False, **self.changes, **row.changes}
        if row.shifted:
            root = self.out / "shifted" / f"seed{seed}"
            shards = build_shifted(root, self.fsdd, COUNTS["audio"], seed)
            changes |= {
                "data.shards": str(shards),
                "data.source": None,
                "data.options": {},
                "data.n_per_class": None,
            }
        return with_changes(usual, changes)


def teach(setting: Setting) -> Path:
    """The teacher of all rows, trained unless it is there; its run directory."""
    config = with_changes(quickstart_config(setting.out / "teacher", 0, "image"), setting.changes)
    if not is_finished(config):
        teacher(config, console=False)
    return setting.out / "teacher"


def remember(setting: Setting, teacher_run: Path, prototypes: int | str) -> Path:
    """A memory of the teacher, built unless it is there; its run directory."""
    run = setting.out / ("memory" if prototypes == RULE else f"memory-{prototypes}")
    config = make_config(
        {
            "run": {"dir": str(run)},
            "teacher": {"run": str(teacher_run)},
            "memory": {"prototypes_per_class": None if prototypes == RULE else prototypes},
        }
    )
    if not (run / "results.json").exists():
        memory(config)
    return run


def trained(setting: Setting, row: Row, seed: int, teacher_run: Path) -> Path:
    """The student of a row and seed, trained unless it is there; its run directory."""
    config = setting.config(row, seed, remember(setting, teacher_run, row.prototypes))
    if not is_finished(config):
        taught = setting.out / "teacher_features.safetensors"
        with (
            minibatch_transport(teacher_features(teacher_run, taught))
            if row.minibatch
            else nullcontext()
        ):
            student(config, console=False)
    return Path(str(config.run.dir))


def wrong_mass(directory: Path) -> float | None:
    """Part of the last batch that was moved to other classes; None without transport."""
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    found = last.get("alignment_wrong_class_mass")
    return None if found is None else float(found)


def run(setting: Setting, rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Every row with every seed: accuracies and comparison with its reference, by name."""
    teacher_run = teach(setting)
    found: dict[str, Correct] = {}
    table: dict[str, dict[str, Any]] = {}
    with known_methods():
        for row in rows:
            runs = {seed: trained(setting, row, seed, teacher_run) for seed in seeds}
            found[row.name] = {seed: recognised(directory) for seed, directory in runs.items()}
            accuracies = {seed: float(part.mean()) for seed, part in found[row.name].items()}
            masses = [wrong_mass(directory) for directory in runs.values()]
            table[row.name] = {
                "mean": statistics.mean(accuracies.values()),
                "seeds": accuracies,
                "wrong_mass": statistics.mean(mass or 0.0 for mass in masses),
                "reference": row.reference,
            }
            shown = "  ".join(f"{accuracy:.1%}" for accuracy in accuracies.values())
            print(f"{row.name}: {shown}", flush=True)
    for row in rows:
        if row.name != row.reference and row.reference in found:
            table[row.name] |= compare(found[row.name], found[row.reference])
    return table


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table for people, differences in points; last, the mass moved to other classes."""
    seeds = list(next(iter(table.values()))["seeds"])
    heads = ["row", "mean", *(f"seed {seed}" for seed in seeds)]
    heads += ["difference", "95 %", "p", "wrong class"]
    lines = [" | ".join(heads), "|".join(["---", *["---:"] * (len(heads) - 1)])]
    for name, row in table.items():
        cells = [name, *(f"{100 * value:.1f}" for value in (row["mean"], *row["seeds"].values()))]
        if "difference" in row:
            points = {key: f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high")}
            p = f"{row['p']:.4f}"
            cells += [points["difference"], f"{points['low']} to {points['high']}", p]
        else:
            cells += ["reference", "", ""]
        cells.append(f"{row['wrong_mass']:.2f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def goals(table: dict[str, dict[str, Any]]) -> list[Goal]:
    """The memory is worth more than what it replaces; in points."""
    return [
        Goal(f"{REFERENCE} over {name}", -100 * row["difference"], 0.0, at_least=True)
        for name, row in table.items()
        if name.startswith("minibatch") and "difference" in row
    ]


def main() -> None:
    """Run, print the table, write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fsdd", type=Path, metavar="DIR", help="recordings; else synthesised")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/ablation[-quick]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, four rows, few steps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or Path("runs") / ("ablation-quick" if given.quick else "ablation")
    changes = {"train.steps": QUICK_STEPS} if given.quick else {}
    rows = [row for row in ROWS if not given.quick or row.name in QUICK]
    table = run(Setting(out, given.fsdd, changes), rows, given.seeds[: 1 if given.quick else None])
    print(markdown(table))
    if given.plot is not None:
        write_plot(table, given.plot)
    finish(table, goals(table), given.json)


if __name__ == "__main__":
    main()
