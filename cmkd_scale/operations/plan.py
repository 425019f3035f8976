"""``cmkd plan``: memory and time of a run on another cluster, from a few steps measured here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.errors import UsageError, did_you_mean
from cmkd_scale.operations.plan_calibration import Calibration, calibrate, of_one_rank
from cmkd_scale.operations.plan_cluster import Cluster, Forecast, Work, forecast
from cmkd_scale.operations.plan_memory import BACKENDS, FLOAT, RankMemory, advise, rank_memory
from cmkd_scale.stages.common import start_engine
from cmkd_scale.stages.forward_pass import BATCH_SIZE
from cmkd_scale.stages.guard import guard_steps
from cmkd_scale.stages.streams import SplitData, open_split
from cmkd_scale.stages.student import student_recipe
from cmkd_scale.stages.teacher import teacher_recipe
from cmkd_scale.stages.through_faults import Recipe
from cmkd_scale.training.methods import METHODS

STAGES = ("teacher", "memory", "student")

_SENSITIVITY: tuple[tuple[str, str, float], ...] = (
    ("devices half as fast", "device_speed", 0.5),
    ("devices twice as fast", "device_speed", 2.0),
    ("network a tenth as fast", "network_bytes_per_second", 0.1),
    ("messages ten times as slow", "latency_seconds", 10.0),
    ("nothing hidden behind backward", "overlap", 0.0),
    ("ranks three times as uneven", "straggler_deviation", 3.0),
    ("nodes fail ten times as often", "node_failure_hours", 0.1),
    ("restarts ten times as long", "restart_seconds", 10.0),
)
"""Each assumption in turn: what it says, which it is, what it is multiplied by."""


@dataclass(frozen=True, slots=True)
class Plan:
    """An estimate, with all that it is made of."""

    stage: str
    method: str
    backend: str
    cluster: Cluster
    calibration: Calibration
    memory: dict[str, RankMemory]
    """Of a rank, by backend."""
    advised: str | None
    """The first backend that fits; None: none does, or the device's memory is not known."""
    forecast: Forecast
    sensitivity: dict[str, float]
    """Hours if one assumption is changed, by what is changed."""
    price: float | None
    """Hours times the price of an hour."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        memory = {
            backend: {
                "device_bytes": rank.device_bytes,
                "host_bytes": rank.host_bytes,
                "device": dict(rank.device),
                "host": dict(rank.host),
            }
            for backend, rank in self.memory.items()
        }
        sizes = self.calibration.sizes
        return {
            **asdict(self),
            "memory": memory,
            "ranks": self.cluster.ranks,
            "parameters": sizes.parameters,
            "flops_per_sample": self.calibration.flops_per_sample,
            "checkpoint_bytes": sizes.checkpoint_bytes,
        }


def stage_of(config: Config, stage: str | None = None) -> str:
    """The stage that a config is for: the one that is named, or what its keys say.

    One with a memory, or a method that has a teacher, is a student's; one with a teacher alone is
    a memory's; any other is a teacher's.

    Raises:
        UsageError: there is no such stage.
    """
    if stage is not None:
        if stage not in STAGES:
            raise UsageError(f"--stage '{stage}' is unknown; {did_you_mean(stage, STAGES)}")
        return stage
    method = METHODS.get(config.method.name or "")
    taught = method is not None and (method.needs_memory or method.live)
    if config.memory.run is not None or taught:
        return "student"
    return "memory" if config.teacher.run is not None else "teacher"


def recipe_of(config: Config, stage: str) -> Recipe:
    """What a training stage would train; see the stages for the errors raised."""
    return student_recipe(config) if stage == "student" else teacher_recipe(config)


def make_plan(
    config: Config,
    cluster: Cluster,
    *,
    stage: str | None = None,
    backend: str | None = None,
    device_bytes: float | None = None,
    price_per_hour: float | None = None,
    seconds: float = 10.0,
) -> Plan:
    """Estimate a run on a cluster from its steps on this machine, in one process.

    Args:
        config: of the run.
        cluster: where it is to run.
        stage: see ``stage_of``.
        backend: one of ``BACKENDS``; None: the first that fits.
        device_bytes: memory of a device there; None: not known.
        price_per_hour: of the whole cluster.
        seconds: to measure for.

    Raises:
        UsageError: the stage trains nothing, batches cannot be divided over the ranks, or what the
            stage itself would refuse.
    """
    if distributed.world_size() > 1:
        raise UsageError("cmkd plan measures in one process: start it without a launcher.")
    stage = stage_of(config, stage)
    if stage == "memory":
        raise UsageError(
            "cmkd plan estimates training, and this config is that of `cmkd memory`, which passes "
            "once over the data; `cmkd doctor` says how long that takes."
        )
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"--backend '{backend}' is unknown; {did_you_mean(backend, BACKENDS)}")
    local = of_one_rank(config, cluster.ranks)
    engine = start_engine(local)
    recipe = recipe_of(local, stage)
    data, test = open_split(local, local.data.train_split), open_split(local, local.data.test_split)
    measured = calibrate(
        local, recipe, engine, data, test_samples=len(test.labelled()), seconds=seconds
    )
    names = BACKENDS if cluster.ranks > 1 else ("single",)
    memory = {name: rank_memory(measured.sizes, name, cluster.ranks) for name in names}
    advised = None
    if device_bytes is not None:
        advised = advise(
            measured.sizes,
            cluster.ranks,
            int(device_bytes),
            shared=measured.device == "cpu",
        )
    chosen = backend or advised or names[0]
    chosen = chosen if cluster.ranks > 1 else "single"
    work = work_of(config, recipe, measured, test)
    found = forecast(chosen, work, cluster)
    return Plan(
        stage=stage,
        method=recipe.method_name,
        backend=chosen,
        cluster=cluster,
        calibration=measured,
        memory=memory,
        advised=advised,
        forecast=found,
        sensitivity=sensitivity(chosen, work, cluster),
        price=price_of(found.hours, price_per_hour),
    )


def work_of(config: Config, recipe: Recipe, measured: Calibration, test: SplitData) -> Work:
    """What a run has to do, from what some of its steps took."""
    steps = config.train.steps
    if recipe.guarded:
        steps += guard_steps(config)
    sizes = measured.sizes
    forward = (measured.forward_seconds + measured.data_seconds) / measured.samples
    tested = len(test.labelled())
    return Work(
        steps=steps,
        compute_seconds=measured.step_seconds,
        backward_seconds=measured.backward_seconds,
        parameter_bytes=FLOAT * sizes.parameters,
        exchange_bytes=measured.exchange_bytes,
        checkpoint_every=config.train.checkpoint_every_steps,
        stall_seconds=sizes.checkpoint_bytes / measured.copy_bytes_per_second,
        start_seconds=measured.start_seconds,
        evaluation_batches=-(-tested // BATCH_SIZE),
        evaluation_seconds=forward * min(BATCH_SIZE, tested),
    )


def sensitivity(backend: str, work: Work, cluster: Cluster) -> dict[str, float]:
    """Hours of the run when each assumption is another."""
    return {
        title: forecast(
            backend, work, replace(cluster, **{name: factor * getattr(cluster, name)})
        ).hours
        for title, name, factor in _SENSITIVITY
    }


def price_of(hours: float, price_per_hour: float | None) -> float | None:
    """What a run costs."""
    return None if price_per_hour is None else hours * price_per_hour
