"""The runs of ``accuracy.py``: teachers, memories and students, each trained once.

Every run is a directory below ``--out``. One that has the results of its configuration is read;
another is begun or continued. Processes share the work through locks: a student that one of them
is at is passed over by the others, a teacher or memory is waited for.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from cmkd_scale.config import make_config
from cmkd_scale.errors import PreemptedError
from cmkd_scale.stages.build_memory import memory
from cmkd_scale.stages.student import student
from cmkd_scale.stages.teacher import teacher
from tools.bench._accuracy_setting import Item, Setting, Teachers, locked, memories_of
from tools.bench._accuracy_statistics import counting_cpu
from tools.bench._accuracy_tasks import Task
from tools.bench._students import is_finished


def teach(setting: Setting, source: str) -> Path:
    """The teacher of a source, trained unless it is there; its run directory."""
    with locked(setting.out / "locks" / f"teacher-{source}.lock"):
        config = setting.teacher_config(source)
        if not is_finished(config):
            teacher(config, console=False)
    return Path(str(config.run.dir))


def remember(setting: Setting, source: str) -> None:
    """Build the memory of a source's teacher unless it is there."""
    taught, run = teach(setting, source), setting.out / "memories" / source
    with locked(setting.out / "locks" / f"memory-{source}.lock"):
        if not (run / "results.json").exists():
            memory(make_config({"run": {"dir": str(run)}, "teacher": {"run": str(taught)}}))


def teachers_of(setting: Setting, item: Item) -> Teachers:
    """Where teacher and memories of a student are, or will be."""
    sources = item.task.teachers[: memories_of(item.row)]
    memories = tuple(setting.out / "memories" / source for source in sources)
    return Teachers(setting.out / "teachers" / sources[0], memories)


def finished_run(setting: Setting, item: Item) -> Path | None:
    """The run directory of a student, if it is finished."""
    run = setting.out / "students" / item.name
    if (run / "results.json").exists() and is_finished(
        setting.config(item, teachers_of(setting, item))
    ):
        return run
    return None


def items_of(tasks: Sequence[Task], seeds: Sequence[int]) -> list[Item]:
    """All students, seed by seed, so that work which is stopped leaves whole seeds."""
    return [Item(task, row, seed) for task in tasks for seed in seeds for row in task.rows]


def shard_of(items: Sequence[Item], part: int, parts: int) -> list[Item]:
    """Part 1 .. ``parts`` of the students."""
    return list(items[part - 1 :: parts])


def train_all(setting: Setting, items: Sequence[Item], jobs: int = 1) -> dict[str, str]:
    """Train what is not finished, in ``jobs`` processes; why a student failed, by its name."""
    if jobs == 1:
        return _train_here(setting, items)
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in [pool.submit(_train_here, setting, items) for _ in range(jobs)]:
            failed |= part.result()
    return failed


def _train_here(setting: Setting, items: Sequence[Item]) -> dict[str, str]:
    torch.set_num_threads(1)
    # A process keeps the directory of every run that it has written open.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    failed: dict[str, str] = {}
    waiting: list[Item] = []
    for round_items, wait in ((items, False), (waiting, True)):
        for item in round_items:
            lock = setting.out / "locks" / f"{item.name.replace('/', '-')}.lock"
            with locked(lock, wait=wait) as held:
                if held:
                    failed |= _train_one(setting, item)
                else:
                    waiting.append(item)
    return failed


def _train_one(setting: Setting, item: Item) -> dict[str, str]:
    """Train a student unless it is finished; its name and what went wrong, if anything did."""
    try:
        teachers = teachers_of(setting, item)
        for source in teachers.memories:
            remember(setting, source.name)
        config = setting.config(item, teachers)
        if not is_finished(config):
            with counting_cpu():
                accuracy = student(config, console=False)["metrics"]["test/accuracy"]
            print(f"{item.name}: {accuracy:.1%}", flush=True)
    except PreemptedError:
        raise
    except Exception as error:  # one row that does not run must not end hours of others
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"{item.name}: {reason}", flush=True)
        return {item.name: reason}
    return {}
