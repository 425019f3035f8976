"""``cmkd doctor``: what would end a run in hour three, found in its first minute.

Checks go from what needs nothing to what needs all that went before; a blocker ends them, since
what follows would fail for the same reason. Each rank looks for itself, and all hear of it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cmkd_scale import distributed
from cmkd_scale.config import Config, load_config
from cmkd_scale.errors import CmkdError
from cmkd_scale.operations import doctor_data, doctor_estimate, doctor_machine, doctor_ranks
from cmkd_scale.operations.doctor_estimate import Estimate
from cmkd_scale.operations.doctor_findings import Book, Finding, attempt
from cmkd_scale.operations.plan import price_of, recipe_of, stage_of, work_of
from cmkd_scale.operations.plan_calibration import calibrate
from cmkd_scale.operations.plan_memory import FLOAT, rank_memory
from cmkd_scale.stages.common import load_trained, open_split_for, with_data_of
from cmkd_scale.stages.runs import check_same_run
from cmkd_scale.stages.streams import SplitData, label_report, open_split
from cmkd_scale.stages.train import check_labels
from cmkd_scale.training.checkpoint import candidates
from cmkd_scale.training.engine import Engine
from cmkd_scale.training.trackers import check_trackers

_MEETING_SECONDS = 60.0  # that ranks wait for each other here


@dataclass(frozen=True, slots=True)
class Report:
    """What was found."""

    stage: str | None
    """None if the config cannot be read."""
    ranks: int
    findings: tuple[Finding, ...]
    estimate: Estimate | None
    """None if something stands in its way."""
    exit_code: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def doctor(
    path: Path,
    pairs: Sequence[str] = (),
    *,
    stage: str | None = None,
    price_per_hour: float | None = None,
    seconds: float = 5.0,
) -> Report:
    """Look at a run before it is started; a collective call once ranks have met.

    Args:
        path: config file.
        pairs: overrides ``a.b=c``.
        stage: see ``plan.stage_of``.
        price_per_hour: of all machines together.
        seconds: to measure steps for.

    Raises:
        UsageError: there is no such stage.
    """
    begun = time.perf_counter()
    book = Book()
    visit = _Visit(book, price_per_hour, seconds)
    config, problem = attempt("config", lambda: load_config(path, pairs))
    book.findings += problem
    seen = None
    if config is not None:
        seen = stage_of(config, stage)
        visit.see(config, seen)
    return Report(
        stage=seen,
        ranks=distributed.world_size(),
        findings=tuple(book.findings),
        estimate=visit.estimate,
        exit_code=book.exit_code,
        seconds=round(time.perf_counter() - begun, 1),
    )


class _Visit:
    """One look at a run, and what has come of it so far."""

    def __init__(self, book: Book, price_per_hour: float | None, seconds: float) -> None:
        self.book = book
        self.price_per_hour = price_per_hour
        self.seconds = seconds
        self.estimate: Estimate | None = None

    def see(self, config: Config, stage: str) -> None:
        """All checks, up to a blocker."""
        engine = self._meet(config)
        if engine is None:
            return
        self._look_around(config, stage, engine)
        if self.book.blocked:
            return
        if stage == "memory":
            self._look_at_pass(config, engine)
        else:
            self._look_at_training(config, stage, engine)

    def _meet(self, config: Config) -> Engine | None:
        """What each rank can see before it meets the others, and then the meeting."""
        alone = [
            *doctor_machine.packages(),
            *doctor_machine.seen_devices(config),
            *doctor_machine.names(os.environ),
            *doctor_machine.master_port(os.environ),
        ]
        if any(finding.severity == "blocker" for finding in alone):
            self.book.findings += alone  # it would wait for the others in vain
            return None
        try:
            engine = Engine(
                mixed_precision=config.train.mixed_precision,
                world_size=config.run.world_size,
                collective_timeout_seconds=_MEETING_SECONDS,
            )
        except CmkdError as error:
            self.book.findings += [*alone, Finding("launch", "blocker", str(error))]
            return None
        self.book.add(alone)
        return engine

    def _look_around(self, config: Config, stage: str, engine: Engine) -> None:
        """Ranks beside each other, and what each of them reads and writes."""
        self.book.findings += doctor_ranks.same_versions(config, engine.device.type)
        self.book.findings += doctor_ranks.same_clock()
        found, self.bytes_per_second = doctor_ranks.collectives(engine.device)
        self.book.add(found)
        self.book.add(doctor_machine.metrics_port(config, os.environ))
        self.book.add(attempt("trackers", lambda: check_trackers(config.monitor.trackers))[1])
        self.book.add(self._run_directory(config, stage))
        if stage == "memory":
            splits = [config.data.train_split, config.data.validation_split]
        else:
            splits = [config.data.train_split, config.data.test_split]
        self.book.add(doctor_data.inputs(config, splits))

    def _run_directory(self, config: Config, stage: str) -> list[Finding]:
        if config.run.dir is None:
            return [Finding("run directory", "blocker", "run.dir is unset.", "Add run.dir=DIR.")]
        path = config.run.dir
        findings = doctor_ranks.directory(path)
        if path.is_dir():
            findings += attempt("run directory", lambda: check_same_run(path, config, stage))[1]
            findings += doctor_data.checkpoints(path / "checkpoints")
        return findings

    def _open(self, config: Config, split: str) -> SplitData | None:
        """A split, with some of its digests compared; a collective call."""
        data, problem = attempt("shards", lambda: open_split(config, split))
        if data is not None:
            problem = doctor_data.sampled(data.reader.manifest, distributed.rank())
        self.book.add(problem)
        return data

    def _look_at_training(self, config: Config, stage: str, engine: Engine) -> None:
        """Data, memory, and a few steps."""
        train = config.train
        _, problem = attempt(
            "batch",
            lambda: engine.check_batch_size(
                train.global_batch_size, train.gradient_accumulation_steps
            ),
        )
        self.book.add(problem)
        data = self._open(config, config.data.train_split)
        test = self._open(config, config.data.test_split)
        recipe, problem = attempt("method", lambda: recipe_of(config, stage))
        self.book.add(problem)
        if self.book.blocked or data is None or test is None or recipe is None:
            return
        self.book.add(attempt("labels", lambda: check_labels(data, test))[1])
        counted, problem = attempt("samples", lambda: doctor_data.counts(config, data))
        self.book.add(problem or counted or [])
        if self.book.blocked:
            return
        if recipe.memories:
            report, _ = label_report(config, data, recipe.memories)
            self.book.add(doctor_data.labels(report))
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        batch = train.global_batch_size // distributed.world_size()
        batch_bytes = FLOAT * math.prod(data.modality.shape) * batch
        self.book.add(doctor_machine.shared_memory(config, batch_bytes, local_ranks))
        if self.book.blocked:
            return
        available = doctor_estimate.available_to_rank(engine.device, local_ranks)
        measured, problem = attempt(
            "steps",
            lambda: calibrate(
                config,
                recipe,
                engine,
                data,
                test_samples=len(test.labelled()),
                seconds=self.seconds,
            ),
        )
        self.book.add(problem)
        if measured is None or self.book.blocked:
            return
        work = work_of(config, recipe, measured, test)
        hours = doctor_estimate.hours_of(work, distributed.world_size())
        fitting, advised = doctor_estimate.fits(
            measured.sizes,
            engine.backend_name,
            distributed.world_size(),
            available,
            shared=engine.device.type == "cpu",
        )
        directory = Path(str(config.run.dir)) / "checkpoints"
        size, there = measured.sizes.checkpoint_bytes, len(candidates(directory))
        self.book.add(
            [
                *fitting,
                *doctor_estimate.space(directory, size, train.keep_checkpoints, there),
                *doctor_estimate.times(config, measured.step_seconds, hours, datetime.now(UTC)),
                *doctor_estimate.exchange(measured, self.bytes_per_second),
            ]
        )
        world, backend = distributed.world_size(), engine.backend_name
        self.estimate = Estimate(
            parameters=measured.sizes.parameters,
            backend=backend,
            advised=advised,
            rank_bytes=rank_memory(measured.sizes, backend, world).bytes,
            checkpoint_bytes=size,
            step_seconds=measured.step_seconds,
            hours=hours,
            cost=price_of(hours, self.price_per_hour),
        )

    def _look_at_pass(self, config: Config, engine: Engine) -> None:
        """What ``cmkd memory`` does: the teacher's forward passes over its data."""
        if config.teacher.run is None:
            unset = Finding("teacher", "blocker", "teacher.run is unset.", "Add teacher.run=DIR.")
            self.book.add([unset])
            return
        trained = load_trained(config.teacher.run, "teacher")
        if config.data.shards is None:
            config = with_data_of(trained, config)
        data, problem = attempt(
            "shards", lambda: open_split_for(trained, config, config.data.train_split)
        )
        self.book.add(problem)
        if data is None or self.book.blocked:
            return
        self.book.add(doctor_data.sampled(data.reader.manifest, distributed.rank()))
        if self.book.blocked:
            return
        world = distributed.world_size()
        hours = doctor_estimate.pass_hours(
            trained, data, engine.device, config.memory.batch_size, world
        )
        self.book.add(doctor_estimate.times(config, 0.0, hours, datetime.now(UTC)))
        parameters = sum(value.numel() for value in trained.model.parameters())
        self.estimate = Estimate(
            parameters=parameters,
            backend=engine.backend_name,
            advised=None,
            rank_bytes=FLOAT * parameters,
            checkpoint_bytes=0,
            step_seconds=0.0,
            hours=hours,
            cost=price_of(hours, self.price_per_hour),
        )
