"""What ``teacher.cache`` saves: a memory and a student's steps, from it and from a live teacher.

    python tools/bench/teacher_cache.py [--quick] [--json FILE]

One process, one thread, the bundled pictures of two-digit numbers. The teacher is a ResNet of
width 64 with three blocks a stage, trained for one step: what its outputs cost does not depend on
what it knows. Data and runs lie in a temporary directory.

The first table is of ``cmkd memory`` as a whole, each time in a new run: from the live teacher,
with a cache that is written on the way, and from one that is there. The second is of a step of a
student on the same pictures (``--quick``: fewer), reading included: ``kd`` with a live teacher's
sample of the same class beside each, the same from the cache, and ``ce_ls``, which has no teacher.

A ratio is the median over rounds of a variant's time divided by the first row's in the same
round; a row ``... again`` is A against A, the noise.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A script sees only its own directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cmkd_scale.config import Config, make_config
from cmkd_scale.data.build import build
from cmkd_scale.data.datasets import DATASETS
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.common import make_spec, start_engine
from cmkd_scale.stages.company import make_loader
from cmkd_scale.stages.streams import open_split
from cmkd_scale.stages.student import student_recipe
from cmkd_scale.stages.teacher import teacher
from cmkd_scale.stages.through_faults import Run, make_module
from cmkd_scale.stages.watching import Watch
from cmkd_scale.training.watchdog import Watchdog
from tools.bench._bench import Goal, Rows, finish, measure, parse, print_rows

LIVE, WRITTEN, READ = "live teacher", "cache, written first", "cache, read"
CACHED_STEP, PLAIN_STEP = "cache", "no teacher (ce_ls)"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is taught, by whom and to whom."""

    train_per_class: int = 20
    """Pictures of each of 100 numbers."""
    teacher_width: int = 64
    teacher_depth: int = 3
    student_width: int = 16
    batch: int = 64


class Bench:
    """Shards and a teacher in a directory, and what is timed on them."""

    def __init__(self, setting: Setting, root: Path) -> None:
        """Build the shards and train the teacher for a step."""
        self.setting, self.root = setting, root
        self._runs = itertools.count()
        options = {"train_per_class": str(setting.train_per_class), "test_per_class": "1"}
        numbers = DATASETS["numbers"](None, options | {"validation_per_class": "1"})
        for split in numbers.splits:
            build(numbers, root / "shards", modality="image", split=split, samples_per_shard=500)
        size = {"width": setting.teacher_width, "depth": setting.teacher_depth}
        once = {"steps": 1, "global_batch_size": 2}
        teacher(self._config(root / "teacher", model=size, train=once), console=False)

    def _config(self, run: Path, **sections: dict[str, Any]) -> Config:
        data = {"shards": str(self.root / "shards"), "augment": False, "mode": "class_matched"}
        sections["data"] = {**data, **sections.get("data", {})}
        return make_config({"run": {"dir": str(run)}, **sections})

    def build_memory(self, cache: Path | None) -> str:
        """A memory in a new run; returns its digest."""
        source = {"run": str(self.root / "teacher"), "cache": None if cache is None else str(cache)}
        run = self.root / f"memory-{next(self._runs)}"
        return str(memory(self._config(run, teacher=source))["memory_digest"])

    def step(self, method: str, cache: Path | None) -> Callable[[], float]:
        """A step of a student, from reading to the weights; returns its loss."""
        source = {"run": str(self.root / "teacher"), "cache": None if cache is None else str(cache)}
        directory = self.root / f"student-{next(self._runs)}"
        directory.mkdir()
        config = self._config(
            directory,
            teacher=source,
            method={"name": method},
            model={"width": self.setting.student_width},
            train={"global_batch_size": self.setting.batch},
        )
        engine, recipe = start_engine(config), student_recipe(config)
        data = open_split(config, "train")
        spec = make_spec(config, data, recipe.feature_dim)
        watch = Watch(Watchdog(0.0, directory=directory))
        run = Run(config, recipe, [], engine, data, spec, directory, watch, console=False)
        module = make_module(run)
        batches = make_loader(config, recipe.method, recipe.teacher, data, directory).batches()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)

        def step() -> float:
            batch = next(batches)
            loss = module(batch.inputs, batch.labels, 0, batch.beside).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

        return step


def run(bench: Bench, cache: Path, rounds: int) -> tuple[dict[str, Rows], list[Goal]]:
    """Both tables, printed, and the goals; the cache that is read is written first."""
    digests = {bench.build_memory(None), bench.build_memory(cache)}

    def build(source: Callable[[], Path | None]) -> Callable[[], None]:
        return lambda: digests.add(bench.build_memory(source()))

    fresh = (bench.root / f"fresh-{number}" for number in itertools.count())
    tables = {
        "memory": measure(
            {
                LIVE: build(lambda: None),
                f"{LIVE} again": build(lambda: None),
                WRITTEN: build(lambda: next(fresh)),
                READ: build(lambda: cache),
            },
            rounds,
        )
    }
    assert len(digests) == 1
    steps = {LIVE: bench.step("kd", None), f"{LIVE} again": bench.step("kd", None)}
    steps |= {CACHED_STEP: bench.step("kd", cache), PLAIN_STEP: bench.step("ce_ls", None)}
    tables["student step"] = measure(steps, 5 * rounds)
    for title, rows in tables.items():
        print_rows(rows, title=title)
    over_plain = tables["student step"][CACHED_STEP]["ratio"]
    over_plain /= tables["student step"][PLAIN_STEP]["ratio"]
    return tables, [
        Goal("memory from the cache, of the live teacher's", tables["memory"][READ]["ratio"], 0.5),
        Goal("memory with the cache written, too", tables["memory"][WRITTEN]["ratio"], 1.05),
        Goal("step from the cache, of one without a teacher", over_plain, 1.1),
    ]


def main() -> None:
    """Print the tables, and write them if asked."""
    options = parse(__doc__)
    torch.set_num_threads(1)
    setting = Setting(train_per_class=3) if options.quick else Setting()
    with tempfile.TemporaryDirectory(prefix="bench-teacher-cache-") as root:
        bench = Bench(setting, Path(root))
        rows, goals = run(bench, Path(root, "cache"), 3 if options.quick else 7)
    finish(rows, goals, options.json)


if __name__ == "__main__":
    main()
