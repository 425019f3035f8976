"""Cost of a student step with alignment to the memory, in units of the cross-entropy step.

    python tools/bench/step.py [--quick] [--json FILE]

One process, one thread. Variants run in turns; a ratio is the median over rounds of the
variant's time divided by the cross-entropy step's in the same round. The row ``ce_ls again`` is
A against A: its distance from 1 is the noise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cmkd_scale.memory.bank import PrototypeMemory
from cmkd_scale.models.model import build_model
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.methods import METHODS
from cmkd_scale.training.targets import MemoryTargets

CLASSES, DIM, BATCH = 100, 128, 64
GOALS = {1600: 1.02, 8000: 1.02, 100_000: 1.05}


def random_memory(prototypes: int, classes: int) -> PrototypeMemory:
    """A memory of the right shapes: what a step costs does not depend on what it knows."""
    generator = torch.Generator().manual_seed(0)
    per_class = prototypes // classes
    values = torch.randn(prototypes, DIM, generator=generator)
    head = torch.randn(classes, DIM, generator=generator)
    return PrototypeMemory(
        class_names=tuple(map(str, range(classes))),
        prototypes=values,
        prototype_class=torch.arange(classes).repeat_interleave(per_class),
        prototype_mass=torch.full((prototypes,), 1 / per_class),
        soft_labels=torch.softmax(values @ head.T / 4.0, 1),
        radius=torch.ones(prototypes),
        class_mean=torch.zeros(classes, DIM),
        class_variance=torch.ones(classes, DIM),
        class_count=torch.full((classes,), 100),
        class_risk=torch.zeros(classes),
        head_weight=head,
        head_bias=torch.zeros(classes),
        cost_scale=torch.tensor(16.0),
    )


def make_step(method: str, prototypes: int | None) -> Callable[[], None]:
    """One training step of a small ResNet on log-mels, batch 64."""
    torch.manual_seed(0)
    model = build_model(
        encoder="resnet", shape=(1, 40, 64), width=32, depth=1, feature_dim=DIM, classes=CLASSES
    )
    targets = None
    if prototypes is not None:
        targets = MemoryTargets(
            random_memory(prototypes, CLASSES),
            feature_dim=DIM,
            steps=1000,
            epsilon_start=0.1,
            epsilon_end=0.02,
            potential_rate=0.1,
        )
    module = Distillation(model, METHODS[method], targets)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    inputs = torch.randn(BATCH, 1, 40, 64)
    labels = torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        result = module(inputs, labels, 0)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        module.finish_step(result.received)

    return step


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Median ratio to the first variant, and its quartiles, over rounds of turns."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        # The order changes by turn, so that no variant always follows the same one.
        names = list(steps)
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name].append(time.perf_counter() - wall)
            cpu_seconds[name].append(time.process_time() - cpu)
    base = next(iter(steps))
    table = {}
    for name in steps:
        ratios = sorted(s / b for s, b in zip(seconds[name], seconds[base], strict=True))
        cpu_ratios = [s / b for s, b in zip(cpu_seconds[name], cpu_seconds[base], strict=True)]
        table[name] = {
            "ratio": statistics.median(ratios),
            "quartile_1": ratios[len(ratios) // 4],
            "quartile_3": ratios[3 * len(ratios) // 4],
            "cpu_ratio": statistics.median(cpu_ratios),
            "milliseconds": 1000 * statistics.median(seconds[name]),
        }
    return table


def main() -> None:
    """Measure, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [1600, 8000] if options.quick else list(GOALS)
    steps = {"ce_ls": make_step("ce_ls", None), "ce_ls again": make_step("ce_ls", None)}
    for size in sizes:
        steps[f"ucmkd_global, {size:,} prototypes"] = make_step("ucmkd_global", size)
    rows = measure(steps, rounds=9 if options.quick else 41)
    print(f"{'variant':<36}{'ratio':>8}{'quartiles':>16}{'cpu ratio':>11}{'ms':>8}")
    for name, row in rows.items():
        quartiles = f"{row['quartile_1']:.3f}-{row['quartile_3']:.3f}"
        print(
            f"{name:<36}{row['ratio']:>8.3f}{quartiles:>16}{row['cpu_ratio']:>11.3f}"
            f"{row['milliseconds']:>8.1f}"
        )
    goals = []
    for size in sizes:
        value = rows[f"ucmkd_global, {size:,} prototypes"]["ratio"]
        goal = {"name": f"step at {size} prototypes", "value": value, "goal": GOALS[size]}
        goals.append({**goal, "met": value <= GOALS[size]})
    for goal in goals:
        print(f"goal {goal['name']}: {goal['value']:.3f} <= {goal['goal']} met: {goal['met']}")
    if options.json:
        environment = {"torch": torch.__version__, "machine": platform.processor()}
        options.json.write_text(
            json.dumps({"rows": rows, "goals": goals, "environment": environment}, indent=1)
        )


if __name__ == "__main__":
    main()
