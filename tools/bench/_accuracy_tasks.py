"""What ``accuracy.py`` trains: tasks (data, teacher, labels a class), and their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple, get_args

from cmkd_scale.config_sections import MethodConfig
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.stages.quickstart import CLIPS_PER_CLASS, COUNTS
from cmkd_scale.training.methods import METHODS
from tools.bench._accuracy_challenge import CLIPS, PRESETS, pictures_kept

OURS, SEMI, BASELINE, STEP = "ucmkd_global", "ucmkd_semi", "ce_ls", "ce"
"""The method that is compared with every row, the same with unlabelled samples beside, which is
compared with every row, too, what every row is compared with, and whose step is the unit of
cost."""
SHOTS = (1, 3, 10, 50)
MODALITIES = ("image", "audio", "text")
DIRECTIONS = tuple(f"{one}-{other}" for one, other in permutations(MODALITIES, 2))
"""Teacher's modality, student's modality."""
MAIN = "image-audio"
SUITES = ("numbers", "digits", "challenge")
PICTURES = COUNTS["image"]["train_per_class"]
"""A teacher's samples of a class of ``numbers``."""


class Row(NamedTuple):
    """A method and the control of its teacher."""

    method: str
    control: str = "none"
    guarded: bool = True
    """False: without the guard that the method has by itself."""

    @property
    def name(self) -> str:
        """As in results, ``METHOD`` or ``METHOD/CONTROL``, and whether the guard is left out."""
        name = self.method if self.control == "none" else f"{self.method}/{self.control}"
        return name if self.guarded else f"{name} unguarded"

    @property
    def is_control(self) -> bool:
        """Whether it stands for what can be had without a teacher's knowledge."""
        return self.control != "none" or self.method in (STEP, BASELINE)


@dataclass(frozen=True, slots=True)
class Task:
    """A student's data with its teachers; a table of its own."""

    suite: str
    student: str
    """Name of a data source (``_accuracy_runs.Setting``)."""
    teachers: tuple[str, str]
    """Data sources of the teacher, and of a second one for rows that fuse two."""
    shots: int
    """Labelled samples a class; those of a challenge before it takes some away."""
    rows: tuple[Row, ...]
    preset: str = ""

    @property
    def name(self) -> str:
        """For run directories and JSON."""
        what = self.preset or f"{self.teachers[0]}-{self.student}"
        return f"{self.suite}-{what}-{self.shots}"

    @property
    def title(self) -> str:
        """For people."""
        teacher = "image" if self.preset else self.teachers[0]
        words = f"{self.suite}{', ' + self.preset if self.preset else ''}: {teacher}"
        return f"{words} teaches {self.student}, {self.shots} labels a class"


def controls() -> list[Row]:
    """Of ``ucmkd_global``, as far as there are any of these names."""
    known = get_args(MethodConfig.model_fields["control"].annotation)
    return [Row(OURS, name) for name in ("permuted", "random", "orthogonal") if name in known]


def unguarded() -> list[Row]:
    """``ucmkd_global`` and its controls without the guard: what it costs, and what it saves."""
    return [row._replace(guarded=False) for row in (Row(OURS), *controls())]


def every_row() -> list[Row]:
    """The whole method table, the controls, and both without the guard."""
    return [*(Row(name) for name in METHODS), *controls(), *unguarded()]


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """Rows by name, ``all`` for every one; the baseline and, with ours, the controls beside them.

    Raises:
        UsageError: there is no such row.
    """
    known = {row.name: row for row in every_row()}
    chosen = [Row(BASELINE)]
    for name in names:
        if name == "all":
            chosen += known.values()
        elif name in known:
            chosen += [known[name], *(controls() if name == OURS else [])]
        else:
            raise UsageError(f"--methods: there is no row '{name}'; {did_you_mean(name, known)}")
    return list(dict.fromkeys(chosen))


def make_tasks(
    suite: str,
    *,
    methods: Sequence[str] | None = None,
    shots: Sequence[int] | None = None,
    directions: Sequence[str] | None = None,
    speech: bool = True,
) -> list[Task]:
    """The tasks of a suite, or of ``all``.

    Args:
        suite: one of ``SUITES``, or ``all``.
        methods: rows of every table; None takes those that each table usually has.
        shots: labels a class, of ``numbers`` and ``digits``; None takes the usual ones.
        directions: of ``numbers``; None takes all.
        speech: whether there are recordings, which spoken digits need.

    Raises:
        UsageError: an unknown row.
    """
    rows = None if methods is None else tuple(chosen_rows(methods))
    tasks: list[Task] = []
    if suite in ("numbers", "all"):
        tasks += _numbers(rows, shots, directions)
    if suite in ("digits", "all"):
        tasks += _digits(rows or _few(), shots or (2, 10), speech)
    if suite in ("challenge", "all"):
        tasks += [_challenge(name, rows or _few()) for name in PRESETS]
    return tasks


def _numbers(
    rows: tuple[Row, ...] | None, shots: Sequence[int] | None, directions: Sequence[str] | None
) -> Iterable[Task]:
    for direction in directions or DIRECTIONS:
        teacher, student = direction.split("-")
        (third,) = set(MODALITIES) - {teacher, student}
        usual = SHOTS if direction == MAIN else (CLIPS_PER_CLASS,)
        for count in shots or usual:
            here = rows or _usual_rows(direction, count)
            yield Task("numbers", student, (teacher, third), count, here)


def _usual_rows(direction: str, shots: int) -> tuple[Row, ...]:
    if direction == MAIN:
        whole = shots == CLIPS_PER_CLASS
        return tuple(every_row()) if whole else (Row(BASELINE), Row(OURS))
    return Row(BASELINE), Row(OURS), Row(OURS, "permuted")


def _few() -> tuple[Row, ...]:
    """What the smaller tables hold: baseline, the plainest distillation, ours, controls."""
    return (*chosen_rows(["kd_memory", OURS]), *unguarded())


def _digits(rows: tuple[Row, ...], shots: Sequence[int], speech: bool) -> Iterable[Task]:
    pairs = [("digits8", "mnist"), ("mnist", "digits8")]
    pairs += [("spoken", "mnist")] if speech else []
    for student, teacher in pairs:
        (third,) = {"digits8", "mnist", "spoken"} - {student, teacher}
        for count in shots:
            yield Task("digits", student, (teacher, third), count, rows)


def _challenge(name: str, rows: tuple[Row, ...]) -> Task:
    pictures = pictures_kept(PRESETS[name], PICTURES)
    teacher = "image" if pictures == PICTURES else f"image{pictures}"
    return Task("challenge", "audio", (teacher, "text"), CLIPS, rows, preset=name)
