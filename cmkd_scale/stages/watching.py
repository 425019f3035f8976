"""What watches a stage from outside, as long as its process lives."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data import workers
from cmkd_scale.errors import PreemptedError, UsageError
from cmkd_scale.files import write_atomically
from cmkd_scale.monitoring import train_job
from cmkd_scale.monitoring.exporter import Identity, PrometheusSink
from cmkd_scale.monitoring.run_id import run_id
from cmkd_scale.monitoring.sinks import Sink, Sinks
from cmkd_scale.training.loop import Trainer
from cmkd_scale.training.trackers import TrackerSink, check_trackers
from cmkd_scale.training.watchdog import Watchdog

_log = logging.getLogger(__name__)

TARGETS = "targets"
"""Directory of a run with a file for each rank that exports metrics, for Prometheus to find it."""


@dataclass(frozen=True, slots=True)
class Watch:
    """The watchdog and the exporter of this rank, and what else takes logged steps."""

    watchdog: Watchdog
    exporter: PrometheusSink | None = None
    run_id: str = ""
    counts: bool = True
    """Whether steps are the run's own; those of the guard's training only show that it lives."""
    others: list[Sink] = field(default_factory=list)
    """On rank 0, from the first step on: trackers, and the status of a TrainJob."""

    def beside(self) -> Watch:
        """The same for a training that is not the run's own."""
        return replace(self, counts=False)

    def sink(self, config: Config, trainer: Trainer, checkpoint: Path | None) -> Sink:
        """What takes the steps of a training that begins, or begins again.

        Args:
            config: of that training.
            trainer: stands where it begins.
            checkpoint: directory of the one that it begins from.
        """
        if not self.counts:
            return _Beside(self.exporter)
        if self.exporter is not None:
            _introduce(self.exporter, config, trainer, checkpoint)
        for other in self.others:  # there are some after a rollback
            if isinstance(other, TrackerSink):
                other.roll_back(trainer.step)
        if distributed.is_main() and not self.others:
            self.others.extend(self._start_others(config, trainer.step))
        return _Own(self.exporter, Sinks(self.others), config.train.checkpoint_every_steps)

    def _start_others(self, config: Config, step: int) -> Iterator[Sink]:
        status = train_job.from_environment(config.train.steps, step)
        if status is not None:
            yield status
        if config.monitor.trackers:
            yield TrackerSink(
                config.monitor.trackers,
                Path(str(config.run.dir)),
                run_id=self.run_id,
                config=config.model_dump(mode="json"),
                resume_step=step,
            )


def _introduce(
    exporter: PrometheusSink, config: Config, trainer: Trainer, checkpoint: Path | None
) -> None:
    """Export where the run stands, before its first step here."""
    samples = trainer.step * config.train.global_batch_size
    restarts = {f"restarts/{reason}": float(n) for reason, n in trainer.restarts.items()}
    exporter.log(trainer.step, {"samples_seen": float(samples), **restarts})
    exporter.set("cmkd_train_step", trainer.step)
    exporter.set("cmkd_train_planned_steps", config.train.steps)
    exporter.set("cmkd_train_start_timestamp_seconds", time.time(), once=True)
    exporter.set("cmkd_data_bad_samples_limit_ratio", config.data.max_bad_fraction)
    if config.monitor.deadline is not None:
        deadline = config.monitor.deadline.timestamp()
        exporter.set("cmkd_train_deadline_timestamp_seconds", deadline)
    if checkpoint is not None:
        saved = checkpoint.stat().st_mtime
        exporter.set("cmkd_checkpoint_last_success_timestamp_seconds", saved)


class _Own:
    """Takes steps of the run itself. Outlives its training: closing it closes nothing."""

    def __init__(self, exporter: PrometheusSink | None, others: Sinks, every: int) -> None:
        self._exporter = exporter
        self._others = others
        self._every = every

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        if self._exporter is not None:
            self._exporter.step(step, seconds, waited_seconds)
        self._others.step(step, seconds, waited_seconds)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._exporter is not None:
            self._exporter.log(step, values)
            if "step_seconds" in values:
                interval = self._every * values["step_seconds"]
                self._exporter.set("cmkd_checkpoint_interval_seconds", interval)
        self._others.log(step, values)

    def close(self) -> None:
        pass


class _Beside:
    """Takes steps of another training: what they say is not the run's."""

    def __init__(self, exporter: PrometheusSink | None) -> None:
        self._exporter = exporter

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        if self._exporter is not None:
            self._exporter.beat(seconds, waited_seconds)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def watching(
    config: Config, directory: Path, *, stage: str, method: str = "", modality: str = ""
) -> Iterator[Watch]:
    """Watch a stage until the block ends; a collective call.

    After an end, good or bad, the exporter waits to be scraped once more; after a signal there
    is no time for that.

    Args:
        config: of the run.
        directory: of the run.
        stage: the verb.
        method: that trains, if one does.
        modality: of the data.
    """
    distributed.run_on_main(lambda: check_trackers(config.monitor.trackers))
    watchdog = Watchdog(config.run.watchdog_seconds, directory=directory)
    identity = Identity(
        run_id=_run_id(directory),
        stage=stage,
        method=method,
        modality=modality,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    exporter = _exporter(config, identity, watchdog)
    target = _target_file(config, directory, identity.rank)
    watch = Watch(watchdog, exporter, identity.run_id)
    linger_seconds = config.monitor.linger_seconds
    try:
        with watchdog:
            if exporter is not None:
                _announce(target, directory, exporter.port, config.monitor.prometheus_address)
            yield watch
    except BaseException as error:
        if not isinstance(error, Exception) or isinstance(error, PreemptedError):
            linger_seconds = 0.0
        raise
    finally:
        Sinks(watch.others).close()
        if exporter is not None:
            exporter.close(linger_seconds)
            target.unlink(missing_ok=True)


def _run_id(directory: Path) -> str:
    """The run's id, on all ranks: a file system may show it late; a collective call."""
    found = ""

    def read() -> None:
        nonlocal found
        try:
            found = run_id(directory)
        except OSError as error:
            raise UsageError(f"The run's id cannot be written: {error}. Free space.") from None

    distributed.run_on_main(read)
    return distributed.gather_texts(found)[0]


def _target_file(config: Config, run: Path, rank: int) -> Path:
    name = f"rank_{rank:05}.json"
    shared = config.monitor.targets_dir
    if shared is None:
        return run / TARGETS / name
    return shared / f"{_job(run).replace('/', '_')}_{name}"


def _job(run: Path) -> str:
    """What Prometheus calls a run: its directory's name alone is often that of a stage."""
    return "/".join(run.resolve().parts[-2:])


def _announce(file: Path, run: Path, port: int | None, address: str) -> None:
    """Write where this rank's metrics are, as Prometheus' ``file_sd_configs`` reads it."""
    if port is None:
        return
    host = socket.getfqdn() if address in ("0.0.0.0", "::") else address
    host = f"[{host}]" if ":" in host else host
    group = {"targets": [f"{host}:{port}"], "labels": {"job": _job(run)}}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps([group]).encode())
    except OSError as error:  # on a machine that does not share the run's directory
        _log.warning("%s cannot be written (%s); name the rank to Prometheus by hand.", file, error)


def _exporter(config: Config, identity: Identity, watchdog: Watchdog) -> PrometheusSink | None:
    if config.monitor.prometheus_port is None:
        return None
    port = config.monitor.prometheus_port
    return PrometheusSink(
        port + int(os.environ.get("LOCAL_RANK", "0")) if port else 0,
        address=config.monitor.prometheus_address,
        identity=identity,
        probes={
            "cmkd_train_phase_seconds_total": watchdog.phase_seconds,
            "cmkd_data_workers": lambda: {"": float(workers.alive())},
        },
        health=watchdog.health,
    )
