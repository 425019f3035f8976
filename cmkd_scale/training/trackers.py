"""Experiment trackers through Accelerate, of which this file is the second door.

``TrackerSink`` runs Accelerate's own trackers beside a run; ``PrometheusTracker`` is one more of
them, so that any Accelerate loop exports what ours does.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import read_json, to_json, write_atomically
from cmkd_scale.monitoring.sinks import Sink, StepSink

_log = logging.getLogger(__name__)

PROJECT = "cmkd_scale"
"""Under which trackers keep runs, unless their own environment variable says otherwise."""

_MOST_WAITING = 1000  # logged steps that a tracker may be behind
_START_SECONDS = 30  # that W&B may take to begin; its own 90 also hold up the end of a program


class PrometheusTracker(GeneralTracker):  # type: ignore[misc] # accelerate has no types
    """Exports what an Accelerate loop logs: ``Accelerator(log_with=[PrometheusTracker(sink)])``.

    The names of values are those of ``monitoring/metrics.py``; others, and texts, are left out.
    Acts on every rank that has one, as its sink has a port for each. A configuration is not
    exported: it would make a new time series of each of its values.

    Args:
        sink: takes the numbers, as ``PrometheusSink`` does; one that wants to know of every step
            is told of those between two calls together, with their mean duration.
        step: after which the loop begins.
        clock: seconds.
    """

    name = "prometheus"
    requires_logging_directory = False
    main_process_only = False

    def __init__(
        self, sink: Sink, *, step: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__()
        self._sink = sink
        self._step = step
        self._clock = clock
        self._since = clock()

    @property
    def tracker(self) -> Sink:
        """The sink."""
        return self._sink

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Export the numbers of ``values``.

        Args:
            values: of the loop, by name.
            step: that they are of; None is the one after the last.
            kwargs: meant for other trackers.
        """
        step = self._step + 1 if step is None else step
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        steps = step - self._step
        if steps > 0:
            now = self._clock()
            if isinstance(self._sink, StepSink):
                waited = numbers.get("data_wait_seconds", 0.0) / steps
                for passed in range(self._step + 1, step + 1):
                    self._sink.step(passed, (now - self._since) / steps, waited)
            self._step, self._since = step, now
        self._sink.log(step, numbers)

    def finish(self) -> None:
        """Close the sink."""
        self._sink.close()


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run."""

    directory: Path
    run_id: str
    known_as: str | None
    """The id that the tracker gave the run when it was started before; None at the first start."""
    resume_step: int
    """Of the checkpoint that the run goes on from."""
    close_seconds: float


def _tensorboard(run: TrackedRun) -> GeneralTracker:
    # Steps that no checkpoint holds are logged again, so the old ones must not stay.
    return TensorBoardTracker("tensorboard", run.directory, purge_step=run.resume_step + 1)


def _wandb(run: TrackedRun) -> GeneralTracker:
    return WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.run_id,
        name=run.run_id,
        resume="allow",
        dir=run.directory,
        settings={
            "console": "off",  # replacing sys.stdout from a thread would disturb our console
            "init_timeout": _START_SECONDS,
            "finish_timeout": run.close_seconds,
        },
    )


def _mlflow(run: TrackedRun) -> GeneralTracker:
    return MLflowTracker(PROJECT, run_id=run.known_as, run_name=run.run_id)


def _trackio(run: TrackedRun) -> GeneralTracker:
    return TrackioTracker(PROJECT, name=run.run_id, resume="allow")


TRACKERS: dict[str, Callable[[TrackedRun], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
"""How a run is given to each tracker that ``monitor.trackers`` may name."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work here; call it on the rank that tracks, before training.

    W&B may ask for a login here, on a terminal. A server that does not answer is no reason to
    refuse.

    Raises:
        UsageError: a package is missing, or nothing says where it should send what it is given.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in names if name not in available]
    if missing:
        raise UsageError(
            f"monitor.trackers names {', '.join(missing)}, but the package is not installed: "
            f"pip install {' '.join(missing)}, or leave it out."
        )
    if "wandb" in names:
        wandb = importlib.import_module("wandb")
        try:
            with suppress(wandb.errors.CommError):
                wandb.login(verify=False)
        except (wandb.errors.UsageError, ValueError) as error:
            raise UsageError(
                f"monitor.trackers names wandb, which has no account to send to ({error}): set "
                "WANDB_API_KEY or run `wandb login`; WANDB_MODE=offline keeps all in the run "
                "directory."
            ) from None
    if "mlflow" in names and not importlib.import_module("mlflow").is_tracking_uri_set():
        raise UsageError(
            "monitor.trackers names mlflow, but nothing says where its server is: set "
            "MLFLOW_TRACKING_URI, for example to http://mlflow:5000 or sqlite:///runs/mlflow.db."
        )


class TrackerSink:
    """Gives logged steps to Accelerate's trackers, as one run across requeues; for rank 0.

    Each tracker works in a thread of its own: MLflow's client blocks for minutes when its server
    is gone, W&B's for one and a half. A tracker that fails, or falls too far behind, is warned
    about once and left out; the run goes on, and ``metrics.jsonl`` has everything.

    A run that goes on from a checkpoint, in a requeue or rolled back, logs the steps after it
    again. TensorBoard then forgets the old ones; W&B keeps those and drops the new; MLflow and
    trackio keep both.

    Args:
        names: of ``TRACKERS``.
        directory: of the run. TensorBoard and W&B write below it, and ``trackers.json`` there
            remembers which trackers know the run, and under which id.
        run_id: see ``monitoring/run_id.py``.
        config: of the run; sections become dotted names. Given to each tracker once in the life
            of a run.
        resume_step: of the checkpoint that the run goes on from.
        close_seconds: that trackers have at the end, all of them together.
    """

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        *,
        run_id: str,
        config: Mapping[str, Any],
        resume_step: int = 0,
        close_seconds: float = 15.0,
    ) -> None:
        PartialState()  # trackers ask it for the rank, from their threads; it is there in a run
        self._file = directory / "trackers.json"
        self._known = _read(self._file)
        self._lock = threading.Lock()  # of the file and of what it holds
        self._config = _flat(config)
        self._close_seconds = close_seconds
        run = TrackedRun(directory, run_id, None, resume_step, close_seconds)
        self._workers = [_Worker(name, partial(self._open, name, run)) for name in names]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand ``values`` to every tracker; returns at once."""
        for worker in self._workers:
            worker.log(step, values)

    def roll_back(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``; returns at once."""
        for worker in self._workers:
            worker.roll_back(step)

    def close(self) -> None:
        """Let trackers finish what they have, for ``close_seconds`` at most."""
        deadline = time.monotonic() + self._close_seconds
        for worker in self._workers:
            worker.end()
        for worker in self._workers:
            worker.join(deadline - time.monotonic())

    def _open(self, name: str, run: TrackedRun, step: int | None = None) -> GeneralTracker:
        """Start a tracker; called in its thread, where it stays: some keep theirs per thread.

        Args:
            name: of the tracker.
            run: as it begins here.
            step: that it has rolled back to.
        """
        known_as = self._known.get(name)
        step = run.resume_step if step is None else step
        tracker = TRACKERS[name](replace(run, known_as=known_as, resume_step=step))
        tracker.start()
        if known_as is None:
            # MLflow's server gives its own ids.
            known_as = tracker.tracker.info.run_id if name == "mlflow" else run.run_id
            with self._lock:
                self._known[name] = known_as
                write_atomically(self._file, to_json(self._known))
            tracker.store_init_configuration(self._config)
        return tracker


class _Logged(NamedTuple):
    step: int
    values: dict[str, float]


class _RolledBack(NamedTuple):
    step: int


class _Worker:
    """One tracker and the thread that it works in."""

    def __init__(self, name: str, start: Callable[..., GeneralTracker]) -> None:
        self._name = name
        self._start = start
        self._waiting: SimpleQueue[_Logged | _RolledBack | None] = SimpleQueue()
        self._left_out = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name} tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._left_out.is_set():
            return
        if self._waiting.qsize() >= _MOST_WAITING:
            self._leave_out(f"it is {_MOST_WAITING} logged steps behind")
        else:
            self._waiting.put(_Logged(step, dict(values)))

    def roll_back(self, step: int) -> None:
        self._waiting.put(_RolledBack(step))

    def end(self) -> None:
        """Nothing more is logged."""
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        """Wait until it has taken everything, at most so long."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._leave_out("it does not come to an end")

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (item := self._waiting.get()) is not None:
                if isinstance(item, _RolledBack):
                    tracker.finish()
                    tracker = self._start(step=item.step)
                else:
                    tracker.log(item.values, step=item.step)
            tracker.finish()
        except Exception as error:
            self._leave_out(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _leave_out(self, reason: str) -> None:
        if not self._left_out.is_set():
            self._left_out.set()
            _log.warning(
                "The tracker %s is left out from now on (%.500s). The run goes on; metrics.jsonl "
                "has every logged step.",
                self._name,
                reason,
            )


def _read(file: Path) -> dict[str, str]:
    """What trackers know the run as; nothing where no file says so."""
    if not file.exists():
        return {}
    try:
        return {name: str(known_as) for name, known_as in read_json(file).items()}
    except IntegrityError:
        _log.warning("%s is damaged; trackers take what follows for a new run.", file)
        return {}


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested sections as dotted names, with values of the types that every tracker takes."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float) else str(value)
    return flat
