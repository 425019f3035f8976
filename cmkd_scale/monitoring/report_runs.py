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
        label = run.method if run.stage in _STUDENT else run.stage
        by_method.setdefault(label, []).append(run)
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
    config, method, seed = _read_config(path / "config.yaml")
    environment = _read_object(path / "env.json")
    return Run(
        path=path,
        name=name,
        stage=str(results.get("stage") or environment.get("stage") or ""),
        method=results.get("method", method),
        seed=results.get("seed", seed),
        results=results,
        steps=steps,
        config=config,
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


def _read_object(file: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no such file."""
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
    results = _read_object(file)
    for key in ("stage", "method", "memory_file", "memory_digest", "config_digest", "finished"):
        _expect(file, key, results.get(key), str)
    for key in ("metrics", "versions"):
        _expect(file, key, results.get(key), dict)
    for key in ("seed", "steps"):
        _expect(file, key, results.get(key), int)
    _expect(file, "wall_seconds", results.get("wall_seconds"), (int, float))
    metrics = results.get("metrics") or {}
    for key in ("test/accuracy", "test/cross_entropy"):
        _expect(file, key, metrics.get(key), (int, float))
    _expect(file, "test/per_class_accuracy", metrics.get("test/per_class_accuracy"), dict)
    _expect(file, "bound", metrics.get("bound"), list)
    return {key: value for key, value in results.items() if value is not None}


def _expect(file: Path, key: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Refuse a value that is there and is not a ``kind``; true and false are no numbers."""
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise IntegrityError(
            f"{file} is malformed: {key} is of the JSON type of {type(value).__name__!r}; {_AGAIN}"
        )


def _read_config(file: Path) -> tuple[str, str, int | None]:
    """Return the text of a resolved configuration, its method with control, and its seed."""
    if not file.is_file():
        return "", "unknown", None
    try:
        text = file.read_text(encoding="utf-8")
        sections = yaml.safe_load(text)
        method = sections["method"]
        control = method.get("control", "none")
        name = str(method["name"]) if control == "none" else f"{method['name']}/{control}"
        return text, name, int(sections["run"]["seed"])
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
        raise IntegrityError(
            f"{file} is not the resolved configuration of a run ({err!r}); restore it or move it "
            "away, the report does without."
        ) from None
