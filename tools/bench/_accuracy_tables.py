"""Tables of ``accuracy.py``: read from the runs, written for people."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from cmkd_scale.files import read_json
from cmkd_scale.stages.quickstart import CLIPS_PER_CLASS
from tools.bench._ablation_statistics import Correct
from tools.bench._accuracy_runs import finished_run
from tools.bench._accuracy_setting import Item, Setting
from tools.bench._accuracy_statistics import (
    check_bound,
    compare_all,
    costs,
    labels_needed,
    step_cpu,
)
from tools.bench._accuracy_tasks import BASELINE, MAIN, OURS, SEMI, Task
from tools.bench._students import recognised

Table = dict[str, Any]
"""Of one task: ``title``, ``suite``, ``direction``, ``shots``, ``seeds``; ``rows``, by name:
``mean``, ``seeds`` (seed -> accuracy), ``control``, and where there are any ``cost``, ``bound``,
``to_baseline``, ``ours_over``; ``failed``, why there is no such row."""

NOTES = f"""\
Accuracy in %, difference in points, both means over seeds; 95 % by bootstrap over seeds, then
clips; p by sign flips over clips within seeds, times what Holm asks for the rows of the table; it
takes the trained models as given. Cost: CPU time of a training step in steps of `ce` (`{BASELINE}`
where there is no `ce`) with the same seed: data, forward passes with a live teacher's, backward
and optimiser; not the teacher's training, the memory, evaluation or what comes before the first
step (a guard's short training without teacher)."""


def read_table(
    setting: Setting, task: Task, seeds: Sequence[int], failed: Mapping[str, str]
) -> Table:
    """The table of a task, as far as its students are finished.

    Args:
        setting: where the runs are.
        task: which of them.
        seeds: which of them.
        failed: name of an item -> what went wrong.
    """
    found: defaultdict[str, dict[int, Any]] = defaultdict(dict)
    seconds: defaultdict[str, dict[int, float]] = defaultdict(dict)
    bounds: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for row in task.rows:
        for seed in seeds:
            item = Item(task, row, seed)
            run = None if item.name in failed else finished_run(setting, item)
            if run is None:
                if item.name in failed:
                    reasons.setdefault(row.name, failed[item.name])
                continue
            found[row.name][seed] = recognised(run)
            if (cpu := step_cpu(run)) is not None:
                seconds[row.name][seed] = cpu
            metrics = read_json(run / "results.json")["metrics"]
            bounds[row.name].append(check_bound(metrics.get("bound") or []))
    rows = _rows(found)
    for row in task.rows:
        if row.name in rows:
            rows[row.name]["control"] = row.is_control
            worst = _worst(bounds[row.name])
            rows[row.name] |= {"bound": worst} if worst else {}
    for name, cost in costs(seconds).items():
        rows[name]["cost"] = cost
    return {
        "title": task.title,
        "suite": task.suite,
        "direction": f"{task.teachers[0]}-{task.student}",
        "shots": task.shots,
        "seeds": list(seeds),
        "rows": rows,
        "failed": reasons,
    }


def _rows(found: Mapping[str, Correct]) -> dict[str, dict[str, Any]]:
    compared = compare_all(found)
    rows: dict[str, dict[str, Any]] = {}
    for name, correct in found.items():
        accuracies = {seed: float(part.mean()) for seed, part in correct.items()}
        mean = statistics.mean(accuracies.values())
        rows[name] = {"mean": mean, "seeds": accuracies, **compared[name]}
    return rows


def _worst(checks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for check in checks for name in check}
    return {name: max(check[name] for check in checks if name in check) for name in sorted(names)}


def markdown(tables: Mapping[str, Table]) -> str:
    """All tables, the label-efficiency curve and how to read them."""
    parts = [_table(table) for table in tables.values() if table["rows"] or table["failed"]]
    curve = curve_of(tables)
    if len(curve) > 1:
        parts.append(_curve_table(curve))
    return "\n\n".join([*parts, NOTES])


def _table(table: Table) -> str:
    heads = ["row", "mean", "seeds " + " ".join(map(str, table["seeds"]))]
    heads += [f"to `{BASELINE}`", "95 %", "p", f"`{OURS}` over it", "95 %", "p", "cost"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, row in sorted(table["rows"].items(), key=lambda item: -item[1]["mean"]):
        accuracies = [row["seeds"].get(seed) for seed in table["seeds"]]
        shown = " ".join("-" if value is None else f"{100 * value:.1f}" for value in accuracies)
        cells = [f"`{name}`", f"{100 * row['mean']:.1f}", shown]
        cells += [*_difference(row.get("to_baseline")), *_difference(row.get("ours_over"))]
        lines.append([*cells, f"{row['cost']:.2f}" if "cost" in row else ""])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failed = [f"- `{name}` did not run: {reason}" for name, reason in table["failed"].items()]
    below = [*(["\n".join(failed)] if failed else []), *_semi_over_all(table["rows"])]
    return "\n\n".join([f"### {table['title']}", text, *below])


def _semi_over_all(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far the row with unlabelled samples is ahead of the one that comes nearest to it."""
    over = {name: row["semi_over"] for name, row in rows.items() if "semi_over" in row}
    if not over:
        return []
    nearest = min(over, key=lambda name: over[name]["difference"])
    points, interval, p = _difference(over[nearest])
    largest = max(row["p_holm"] for row in over.values())
    return [
        f"`{SEMI}` over `{nearest}`, which comes nearest to it: {points} ({interval}), p {p}; "
        f"largest p over any row {largest:.4f}."
    ]


def _difference(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    points = [f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high")]
    return [points[0], f"{points[1]} to {points[2]}", f"{found['p_holm']:.4f}"]


# --------------------------------------------------------------------- label efficiency


def curve_of(tables: Mapping[str, Table]) -> dict[int, dict[str, Any]]:
    """Labels a class -> rows of ``ce_ls`` and ``ucmkd_global``, from pictures to speech."""
    found = {}
    for table in tables.values():
        rows = table["rows"]
        main = table["suite"] == "numbers" and table["direction"] == MAIN
        if main and BASELINE in rows and OURS in rows:
            found[int(table["shots"])] = {name: rows[name] for name in (BASELINE, OURS)}
    return dict(sorted(found.items()))


def reading(curve: Mapping[int, Mapping[str, Any]]) -> tuple[int, float | None]:
    """With how many labels the teacher is used (3, or the fewest), and how many do as much
    without one; None: more than there are."""
    shots = CLIPS_PER_CLASS if CLIPS_PER_CLASS in curve else min(curve)
    without = {count: float(rows[BASELINE]["mean"]) for count, rows in curve.items()}
    return shots, labels_needed(without, float(curve[shots][OURS]["mean"]))


def reading_text(curve: Mapping[int, Mapping[str, Any]]) -> str:
    """The same in words."""
    shots, needed = reading(curve)
    many = f"more than {max(curve)}" if needed is None else f"{needed:.0f}"
    return f"{shots} labels a class with teacher = {many} without"


def _curve_table(curve: Mapping[int, Mapping[str, Any]]) -> str:
    lines = ["| labels a class | no teacher | with teacher |", "|---:|---:|---:|"]
    for count, rows in curve.items():
        means = (f"{100 * rows[name]['mean']:.1f}" for name in (BASELINE, OURS))
        lines.append(f"| {count} | {' | '.join(means)} |")
    return "\n".join(["### Label efficiency, image to audio", "", *lines, "", reading_text(curve)])
