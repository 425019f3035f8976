"""Cost of a student step with alignment to the memory, beside plain and reference steps.

    python tools/bench/step.py [--quick] [--json FILE]

One process, one thread, AdamW and a clipped gradient in every variant; what is not measured is
reading data, of which the reference's methods need twice as much. ``sumall`` and ``bilevel`` run
a teacher of the student's size in each step (see ``_reference_steps``). The goals are about the
first three stages of ResNet-18 on log-mels, batch 64; the last table is of a network with a
quarter of that work, the quickstart's with twice its width, where what alignment costs is a
larger part.

The second table is the cost of a whole run in units of the cross-entropy step: for us the
memory, which is one pass of the teacher over its own data and k-means, and then the steps; for
the reference the steps alone. The pass is measured by the batch, k-means on some of the classes
with as many samples each as in the whole, and both are extended linearly. Training the teacher is
the same for all and left out.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench._bench import Goal, Rows, finish, measure, parse, print_rows
from tools.bench._reference_steps import bilevel_step, sumall_step
from tools.bench._step_variants import (
    SIZES,
    Setting,
    memory_build,
    our_step,
    reference_step,
    teacher_pass,
)

GOALS = {1600: 1.02, 8000: 1.02, 100_000: 1.05}
TOTAL_GOAL = 5.0
PASS, BUILD = "teacher pass, a batch", "k-means and the rest, some classes"


def measure_steps(setting: Setting, rounds: int) -> Rows:
    """Every kind of step."""
    variants = {name: our_step(setting, "ce_ls", None) for name in ("ce_ls", "ce_ls again")}
    for size in setting.sizes:
        variants[our_name(size)] = our_step(setting, "ucmkd_global", size)
    variants["sumall"] = reference_step(setting, sumall_step)
    variants["bilevel"] = reference_step(setting, bilevel_step)
    return measure(variants, rounds)


def measure_memory(setting: Setting, rounds: int) -> Rows:
    """What is paid once, beside the step that is the unit."""
    variants = {name: our_step(setting, "ce_ls", None) for name in ("ce_ls", "ce_ls again")}
    variants[PASS] = teacher_pass(setting)
    variants[BUILD] = memory_build(setting)
    return measure(variants, rounds)


def total_costs(setting: Setting, steps: Rows, memory: Rows) -> Rows:
    """Cost of a whole run of each method, in units of the cross-entropy step."""
    once = (
        math.ceil(setting.samples / setting.batch) * memory[PASS]["ratio"]
        + setting.classes / setting.built_classes * memory[BUILD]["ratio"]
    )
    ours = our_name(setting.counted_size)
    table = {}
    for name in ("ce_ls", ours, "sumall", "bilevel"):
        prepared = once if name == ours else 0.0
        total = prepared + setting.steps * steps[name]["ratio"]
        table[name] = {"memory": prepared, "steps": total - prepared, "total": total}
    for row in table.values():
        row["of_ours"] = row["total"] / table[ours]["total"]
    return table


def our_name(size: int) -> str:
    """Name of the row of a memory with ``size`` prototypes."""
    return f"ucmkd_global, {size:,} prototypes"


def run(setting: Setting, rounds: int) -> tuple[dict[str, Rows], list[Goal]]:
    """All tables, printed as they come, and the goals."""
    steps = measure_steps(setting, rounds)
    print_rows(steps)
    memory = measure_memory(setting, max(3, rounds // 4))
    print()
    print_rows(memory, title="paid once")
    total = total_costs(setting, steps, memory)
    print(
        f"\n{setting.epochs} epochs of {setting.samples:,} samples of the student, as many of "
        "the teacher; in steps of ce_ls"
    )
    print(f"{'method':<36}{'memory':>10}{'steps':>12}{'total':>12}{'of ours':>10}")
    for name, row in total.items():
        print(
            f"{name:<36}{row['memory']:>10,.0f}{row['steps']:>12,.0f}{row['total']:>12,.0f}"
            f"{row['of_ours']:>10.2f}"
        )
    goals = [
        Goal(f"step at {size} prototypes", steps[our_name(size)]["ratio"], GOALS[size])
        for size in setting.sizes
        if size in GOALS
    ]
    name = "whole run of bilevel, over ours with its memory"
    goals.append(Goal(name, total["bilevel"]["of_ours"], TOTAL_GOAL, at_least=True))
    return {"step": steps, "memory": memory, "total": total}, goals


def main() -> None:
    """Measure, print the tables, and write them if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    sizes = (1600, 8000) if options.quick else SIZES
    rounds = 9 if options.quick else 41
    rows, goals = run(Setting(sizes=sizes), rounds)
    print("\na small network")
    rows["small"] = measure_steps(Setting(width=32, depth=1, sizes=sizes), rounds)
    print_rows(rows["small"])
    finish(rows, goals, options.json)


if __name__ == "__main__":
    main()
