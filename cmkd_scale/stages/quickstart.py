"""``cmkd quickstart``: shards, teacher, memory, students and controls, evaluation, report.

An image teacher (two handwritten digits side by side) teaches a student of speech (spoken
numbers) that has three labelled clips a class. No picture is paired with a sound.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cmkd_scale.config import Config, make_config
from cmkd_scale.errors import UsageError
from cmkd_scale.monitoring.report import write_report
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.runs import versions, write_json
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher

CLIPS_PER_CLASS = 3
SEEDS = 3
COUNTS = {
    "image": {"train_per_class": 60, "validation_per_class": 5, "test_per_class": 10},
    "audio": {"train_per_class": 9, "validation_per_class": 1, "test_per_class": 10},
}
"""Samples a class that are built; a seed picks its clips among those for training."""
METHODS = (("ce_ls", "none"), ("ucmkd_global", "none"), ("ucmkd_global", "permuted"))
"""Method and control of each student; the first is the baseline of the table."""


def quickstart(out: Path, *, seed: int = 0, fsdd: Path | None = None) -> dict[str, Any]:
    """Run everything into ``out``; started again, it continues where it stopped.

    Args:
        out: directory of the runs, ``results.json`` and ``report.html``.
        seed: first of three consecutive seeds.
        fsdd: the Free Spoken Digit Dataset; None uses synthesised speech.

    Returns:
        The content of ``results.json``.

    Raises:
        UsageError: ``fsdd`` holds no recordings, or ``out`` holds another quickstart.
    """
    began = time.perf_counter()
    if fsdd is not None and not fsdd.is_dir():
        raise UsageError(
            f"--fsdd: there is no directory {fsdd}. Give the Free Spoken Digit Dataset's "
            "directory, the one that holds recordings/, or leave the option out to use "
            "synthesised speech."
        )
    console = Console(stderr=True)
    console.print("[bold]1/4 teacher[/]: handwritten numbers, learned from their labels")
    teacher_run = out / "teacher"
    taught = teacher(_config(teacher_run, seed, "image"))
    console.print("[bold]2/4 memory[/]: the teacher's prototypes, after which it may go")
    memory_run = out / "memory"
    memory(
        make_config(
            {"run": {"dir": str(memory_run), "seed": seed}, "teacher": {"run": str(teacher_run)}}
        )
    )
    speech = "synthesised speech, unseen voices" if fsdd is None else "FSDD, unseen speakers"
    console.print(
        f"[bold]3/4 students[/]: {speech}, {CLIPS_PER_CLASS} labelled clips a class, {SEEDS} seeds"
    )
    rows, student_runs = _students(out, seed, memory_run, fsdd, console)
    runs = [teacher_run, *student_runs]
    console.print("[bold]4/4 report[/]")
    results = {
        "stage": "quickstart",
        "speech": speech,
        "clips_per_class": CLIPS_PER_CLASS,
        "seeds": list(range(seed, seed + SEEDS)),
        "teacher": {"test/accuracy": taught["metrics"]["test/accuracy"]},
        "summary": summarise(rows),
        "runs": [str(run.relative_to(out)) for run in runs],
        "wall_seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }
    write_json(out / "results.json", results)
    write_report(runs, out / "report.html")
    return {**results, "report": str(out / "report.html")}


def _students(
    out: Path, seed: int, memory_run: Path, fsdd: Path | None, console: Console
) -> tuple[list[tuple[str, int, float]], list[Path]]:
    """Train each method with each seed: (label, seed, accuracy), and the run directories."""
    rows, runs = [], []
    for run_seed in range(seed, seed + SEEDS):
        for name, control in METHODS:
            label = name if control == "none" else f"{name}/{control}"
            run = out / f"{label.replace('/', '-')}-seed{run_seed}"
            config = _config(
                run, run_seed, "audio", memory_run, name, control, fsdd, n_per_class=CLIPS_PER_CLASS
            )
            # Twenty plain lines for each of nine runs would bury the result.
            results = student(config, console=console.is_terminal)
            accuracy = float(results["metrics"]["test/accuracy"])
            rows.append((label, run_seed, accuracy))
            runs.append(run)
            console.print(f"    {label} seed {run_seed}: {accuracy:.1%}", highlight=False)
    return rows, runs


def summarise(rows: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Mean, sample standard deviation and the accuracy of each seed in order, by method."""
    summary: dict[str, Any] = {}
    for label in dict.fromkeys(label for label, _, _ in rows):
        values = [accuracy for name, _, accuracy in sorted(rows) if name == label]
        summary[label] = {
            "test/accuracy": {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "seeds": values,
            }
        }
    return summary


def summary_table(results: dict[str, Any]) -> str:
    """The table that ends a quickstart, as text."""
    table = Table(title=f"test accuracy, {results['speech']}", title_justify="left")
    table.add_column("method")
    for heading in ("mean", "std", *(f"seed {seed}" for seed in results["seeds"]), "x ce_ls"):
        table.add_column(heading, justify="right")
    baseline = results["summary"][METHODS[0][0]]["test/accuracy"]["mean"]
    for label, row in results["summary"].items():
        accuracy = row["test/accuracy"]
        table.add_row(
            label,
            f"{accuracy['mean']:.1%}",
            f"{accuracy['std']:.1%}",
            *(f"{value:.1%}" for value in accuracy["seeds"]),
            f"{accuracy['mean'] / baseline:.2f}" if baseline else "-",
        )
    console = Console(width=88)
    with console.capture() as capture:
        console.print(table)
    return (
        f"{capture.get()}"
        f"teacher (pictures): {results['teacher']['test/accuracy']:.1%}; "
        f"{results['wall_seconds']:.0f} s; report: {results['report']}"
    )


def _guard(control: str) -> bool | None:
    return None if control == "none" else False


def _config(
    run: Path,
    seed: int,
    modality: str,
    memory_run: Path | None = None,
    method: str | None = None,
    control: str = "none",
    fsdd: Path | None = None,
    n_per_class: int | None = None,
) -> Config:
    data: dict[str, Any] = {
        "shards": f"builtin:numbers/{modality}",
        "n_per_class": n_per_class,
        "options": COUNTS[modality],
    }
    train: dict[str, Any] = {"global_batch_size": 128} if modality == "image" else {}
    if fsdd is not None:
        # Two of six speakers are unseen in a fold; three folds test on each speaker once.
        data |= {"source": str(fsdd), "options": {**COUNTS[modality], "fold": seed}}
    elif modality == "audio":
        # Synthesised voices differ in little but what augmentation varies: with it, three
        # clips teach almost everything and no method has much to add (docs/log.md).
        data["augment"] = False
    return make_config(
        {
            "run": {"dir": str(run), "seed": seed},
            "data": data,
            "memory": {"run": None if memory_run is None else str(memory_run)},
            # A control shows what a wrong teacher would do; the guard would leave it out.
            "method": {"name": method, "control": control, "guard": _guard(control)},
            "train": train,
        }
    )
