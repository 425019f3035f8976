"""Configurations of the runs of ``accuracy.py``: what a teacher and a student are made of."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cmkd_scale.config import Config, make_config, with_changes
from cmkd_scale.errors import UsageError
from cmkd_scale.stages.quickstart import CLIPS_PER_CLASS, COUNTS
from cmkd_scale.training.methods import METHODS
from tools.bench._accuracy_challenge import PRESETS, build_challenge
from tools.bench._accuracy_digits import PICTURES, build_digits
from tools.bench._accuracy_tasks import Row, Task

MANY = COUNTS["image"]
"""Samples a class of ``numbers`` where the quickstart's few clips are too few: for teachers, and
for speech with more than 3 labels a class. Test clips are the same."""

BUDGET = {"train.steps": 600, "train.ema_decay": 0.98, "train.log_every_steps": 50}
"""Of every student: twice the usual steps, which all rows gain from (docs/log.md), and averaged
weights."""


class Item(NamedTuple):
    """A student to train."""

    task: Task
    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Its run directory below ``students``."""
        row = self.row.name.replace("/", "-").replace(" ", "-")
        return f"{self.task.name}/{row}-seed{self.seed}"


class Teachers(NamedTuple):
    """What the students of a task learn from."""

    run: Path
    memories: tuple[Path, ...]
    """Two where a row fuses two, else one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where runs live and what they have in common."""

    out: Path
    fsdd: Path | None
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of every config of a teacher or student -> values."""

    def data(self, source: str, *, shots: int | None = None, seed: int = 0) -> dict[str, Any]:
        """The config's ``data`` for a source: a modality of ``numbers`` (``image18``: with 18
        pictures a class), one of ``PICTURES``, or ``spoken`` digits.

        Args:
            source: its name.
            shots: labels a class of a student; None for a teacher, which uses all.
            seed: decides which speakers are unseen.

        Raises:
            UsageError: spoken digits, and no recordings.
        """
        if source in PICTURES:
            with locked(self.out / "locks" / f"{source}.lock"):
                shards = build_digits(source, self.out / "data")
            return {"shards": str(shards), "transform": {"height": 28, "width": 28}}
        if source == "spoken":
            if self.fsdd is None:
                raise UsageError("Spoken digits are those of the FSDD: give --fsdd DIR.")
            return {"shards": "builtin:fsdd/audio", "source": str(self.fsdd)}
        modality = source.rstrip("0123456789")
        counts: dict[str, int] = {**MANY}
        if source == "audio" and shots is not None and shots <= CLIPS_PER_CLASS:
            counts = {**COUNTS["audio"]}
        if source != modality:
            counts["train_per_class"] = int(source.removeprefix(modality))
        data: dict[str, Any] = {"shards": f"builtin:numbers/{modality}", "options": counts}
        return data | (self._speech(seed, counts) if modality == "audio" else {})

    def _speech(self, seed: int, counts: Mapping[str, int]) -> dict[str, Any]:
        # As in the quickstart: folds of unseen speakers, and no augmentation of what is synthetic.
        if self.fsdd is None:
            return {"augment": False}
        return {"source": str(self.fsdd), "options": {**counts, "fold": seed}}

    def teacher_config(self, source: str) -> Config:
        """Of the teacher of a source, which has seed 0."""
        sound_or_text = source.startswith(("audio", "text", "spoken"))
        usual = make_config(
            {
                "run": {"dir": str(self.out / "teachers" / source)},
                "data": self.data(source),
                "train": {} if sound_or_text else {"global_batch_size": 128},
            }
        )
        return with_changes(usual, dict(self.changes))

    def student_data(self, task: Task, seed: int) -> dict[str, Any]:
        """The config's ``data`` for a student of a task."""
        if not task.preset:
            chosen = {"n_per_class": task.shots}
            return self.data(task.student, shots=task.shots, seed=seed) | chosen
        root = self.out / "data" / f"challenge-{task.preset}" / f"seed{seed}"
        preset = PRESETS[task.preset]
        shards = build_challenge(root, self.fsdd, COUNTS["audio"], preset, seed)
        return {"shards": str(shards), **({} if self.fsdd else {"augment": False})}

    def config(self, item: Item, teachers: Teachers) -> Config:
        """Of a student."""
        usual = make_config(
            {
                "run": {"dir": str(self.out / "students" / item.name), "seed": item.seed},
                "data": self.student_data(item.task, item.seed),
                "method": {"name": item.row.method, "control": item.row.control},
            }
        )
        return with_changes(usual, {**BUDGET, **row_config(item.row, teachers), **self.changes})


def row_config(row: Row, teachers: Teachers) -> dict[str, Any]:
    """What a row needs beside its name, as dotted keys of the config.

    A row that reads no memory is given one all the same: its student is as wide as the others'.
    """
    method = METHODS[row.method]
    used = teachers.memories[: memories_of(row)]
    paths = [str(path) for path in used]
    changes: dict[str, Any] = {"memory.run": paths if len(paths) > 1 else paths[0]}
    if method.mode:
        changes["data.mode"] = method.mode
    if method.live:
        changes["teacher.run"] = str(teachers.run)
    if method.unlabelled:
        changes["data.unlabelled"] = "rest"
    if not row.guarded:
        changes["method.guard"] = False
    return changes


def memories_of(row: Row) -> int:
    """Memories that a row is given, one at least."""
    return max(1, METHODS[row.method].memories)


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock against other processes; whether it is held, which only ``wait`` ensures."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
