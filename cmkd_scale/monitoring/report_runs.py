"""What the report reads: run directories, and runs grouped by method.

Any file of a run directory may be missing; a file that is there must be what it says.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.monitoring.jsonl import read_jsonl

CONTROLS = ("ce_ls", "ce")
"""Methods without a teacher that others are held against, the better control first."""

_STUDENT = ("student", "")
_USUAL_METHOD = {"teacher": "ce", "student": "ucmkd_global"}
"""What a stage takes where ``method.name`` is unset; other stages have no method."""
_BY_CLASS = "test/per_class_accuracy"
_AGAIN = "start the stage on this run directory again to write it anew."
_READABLE = ("results.json", "metrics.jsonl", "predictions.safetensors")


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    name: str
    """For people: the directory's name, with its parent's where runs share it."""
    stage: str
    method: str
    seed: int | None
    results: Mapping[str, Any]
    """``results.json``, empty while the run has not been evaluated."""
    steps: Sequence[Mapping[str, Any]]
    """``metrics.jsonl`` in file order."""
    config: str
    """``config.yaml`` as text, empty if missing."""
    settings: Mapping[str, Any]
    """The same, parsed."""
    ranks: int | None
    """Processes that it last ran on."""

    @property
    def label(self) -> str:
        """The method of a student, the stage of anything else."""
        return self.method if self.stage in _STUDENT else self.stage

    @property
    def class_accuracies(self) -> Mapping[str, float]:
        """Test accuracy by class, of those that the test has samples of."""
        found = self.results.get("metrics", {}).get(_BY_CLASS) or {}
        return {name: share for name, share in found.items() if math.isfinite(share)}

    @property
    def skipped_in_test(self) -> int:
        """Test samples left out as damaged."""
        return int(self.metric("test/skipped") or 0)

    @property
    def memory_files(self) -> list[Path]:
        """The memories that the run recorded and that are found, from the run or from here."""
        recorded = self.results.get("memory_files") or [self.results.get("memory_file")]
        places = [(self.path / name, Path(name)) for name in recorded if name]
        found = [[place for place in pair if place.is_file()] for pair in places]
        return [files[0] for files in found if files]

    @property
    def planned_steps(self) -> int | None:
        """``train.steps``; None where the configuration is missing."""
        steps = self.setting("train", "steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def setting(self, section: str, key: str) -> object:
        """A value of the configuration; None where it is missing."""
        values = self.settings.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def backbone(self) -> str:
        """Where it comes from, or its family, and how it was trained; empty: a small encoder."""
        options = self.setting("model", "backbone_config")
        family = options.get("model_type") if isinstance(options, dict) else None
        source = self.setting("model", "backbone") or family
        return f"{source}, {self.setting('model', 'tuning')}" if source else ""

    def metric(self, name: str) -> float | None:
        """A number of ``results.json``'s ``metrics``; None if not measured or not finite."""
        value = self.results.get("metrics", {}).get(name)
        return float(value) if value is not None and math.isfinite(value) else None

    @property
    def wall_seconds(self) -> float | None:
        """Cost of the run."""
        seconds: float | None = self.results.get("wall_seconds")
        return seconds

    @property
    def last_step(self) -> int | None:
        """Steps of the finished run, or the last one logged so far."""
        logged = self.steps[-1]["step"] if self.steps else None
        step: int | None = self.results.get("steps", logged)
        return step


@dataclass(frozen=True)
class Group:
    """The runs of one method, by seed."""

    method: str
    runs: tuple[Run, ...]

    @property
    def is_student(self) -> bool:
        """Whether these are students; a teacher learns another modality, so they don't compare."""
        return self.runs[0].stage in _STUDENT

    def values(self, name: str) -> list[float]:
        """The metric ``name`` of every run that has it."""
        return [value for run in self.runs if (value := run.metric(name)) is not None]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies, 0..1."""
        return self.values("test/accuracy")

    @property
    def mean(self) -> float:
        """Mean test accuracy; -1 where there is none, which sorts last."""
        return statistics.fmean(self.accuracies) if self.accuracies else -1.0

    @property
    def std(self) -> float | None:
        """Sample standard deviation over runs; None for fewer than two."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy_by_seed(self) -> dict[int, float]:
        """Test accuracy by seed, in order; of runs that share a seed the last one."""
        return {
            run.seed: accuracy
            for run in self.runs
            if run.seed is not None and (accuracy := run.metric("test/accuracy")) is not None
        }


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group students by method, other stages by stage; the most accurate first, students first."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.label, []).append(run)
    groups = [
        Group(method, tuple(sorted(group, key=lambda run: (run.seed or 0, str(run.path)))))
        for method, group in by_method.items()
    ]
    return sorted(groups, key=lambda group: (not group.is_student, -group.mean, group.method))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories; one that is named twice counts once.

    Raises:
        UsageError: no directory is given, or one holds nothing of a run.
        IntegrityError: a file is malformed.
    """
    if not paths:
        raise UsageError("No run directory is given. Name at least one, e.g. `cmkd report RUN`.")
    unique = {path.resolve(): path for path in paths}
    names = [path.name for path in unique]
    return [
        _load_run(path, path.name if names.count(path.name) == 1 else "/".join(path.parts[-2:]))
        for path in unique
    ]


def _load_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UsageError(
            f"There is no run directory at {path}; give a directory that a stage has written."
        )
    results = _read_results(path / "results.json")
    steps_file = path / "metrics.jsonl"
    steps = read_jsonl(steps_file) if steps_file.is_file() else []
    if not (steps or "metrics" in results or (path / "predictions.safetensors").is_file()):
        raise UsageError(_nothing_there(path))
    environment = read_object(path / "env.json")
    stage = str(results.get("stage") or environment.get("stage") or "")
    config, settings = _read_config(path / "config.yaml")
    method, seed = _method_and_seed(path / "config.yaml", settings, stage)
    ranks = environment.get("world_size")
    return Run(
        path=path,
        name=name,
        stage=stage,
        method=results.get("method", method),
        seed=results.get("seed", seed),
        results=results,
        steps=steps,
        config=config,
        settings=settings,
        ranks=ranks if isinstance(ranks, int) else None,
    )


def _nothing_there(path: Path) -> str:
    """Say that ``path`` is not a run and which of its subdirectories are."""
    found = [file.parent for name in _READABLE for file in path.glob(f"**/{name}")]
    children = [str(child) for child in sorted(set(found) - {path})]
    remedy = "let its stage log a first step, or give the run.dir of another run"
    if children:
        more = ", ..." if len(children) > 6 else ""
        remedy = f"below it are the runs {', '.join(children[:6])}{more}: give those instead"
    return f"{path} holds no logged step and no result, so there is nothing to report; {remedy}."


def number(record: Mapping[str, Any], key: str) -> float | None:
    """A number of a logged step; None if it is not there or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no such file.

    Raises:
        IntegrityError: it is no JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{file} is not JSON ({error}); {_AGAIN}") from None
    if not isinstance(value, dict):
        raise IntegrityError(f"{file} does not hold a JSON object; {_AGAIN}")
    return value


def _read_results(file: Path) -> Mapping[str, Any]:
    """Return ``results.json`` with the types of what the report uses checked."""
    results = read_object(file)
    for key in ("stage", "method", "memory_file", "memory_digest", "config_digest", "finished"):
        _expect(file, key, results.get(key), str)
    for key in ("metrics", "versions", "restarts"):
        _expect(file, key, results.get(key), dict)
    for key in ("seed", "steps"):
        _expect(file, key, results.get(key), int)
    _expect(file, "wall_seconds", results.get("wall_seconds"), (int, float))
    metrics = results.get("metrics") or {}
    for key in ("test/accuracy", "test/cross_entropy", "test/skipped"):
        _expect(file, key, metrics.get(key), (int, float))
    _expect(file, _BY_CLASS, metrics.get(_BY_CLASS), dict)
    for name, share in (metrics.get(_BY_CLASS) or {}).items():
        _expect(file, f"{_BY_CLASS} of {name}", share, (int, float))
    for reason, times in (results.get("restarts") or {}).items():
        _expect(file, f"restarts of {reason}", times, int)
    _expect(file, "memory_files", results.get("memory_files"), list)
    for name in results.get("memory_files") or []:
        _expect(file, "a name in memory_files", name, str)
    _expect(file, "bound", metrics.get("bound"), list)
    return {key: value for key, value in results.items() if value is not None}


def _expect(file: Path, key: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Refuse a value that is there and is not a ``kind``; true and false are no numbers."""
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise IntegrityError(
            f"{file} is malformed: {key} is of the JSON type of {type(value).__name__!r}; {_AGAIN}"
        )


def _read_config(file: Path) -> tuple[str, dict[str, Any]]:
    """Return a resolved configuration as text and parsed; both empty if there is no such file."""
    if not file.is_file():
        return "", {}
    try:
        text = file.read_text(encoding="utf-8")
        # Aliases, which no resolved configuration has, could stand for far more than they look.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError("it has aliases")
        return text, dict(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise _no_config(file, error) from None


def _method_and_seed(file: Path, settings: Mapping[str, Any], stage: str) -> tuple[str, int | None]:
    """The method with its control, and the seed, that a configuration says."""
    if not settings:
        return "unknown", None
    try:
        method = settings["method"]
        name, control = method.get("name"), method.get("control", "none")
        if name is None:
            name = _USUAL_METHOD.get(stage, "")
        seed = int(settings["run"]["seed"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_config(file, error) from None
    return f"{name}" if control == "none" else f"{name}/{control}", seed


def _no_config(file: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"{file} is not the resolved configuration of a run ({error!r}); restore it or move it "
        "away, the report does without."
    )
