"""A few steps of a run, as its stage would take them, timed: what estimates are made of.

The steps are those of the run's own ``Trainer`` on its own data, in a directory that is thrown
away; nothing is saved.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from cmkd_scale import distributed
from cmkd_scale.config import Config, with_changes
from cmkd_scale.errors import UsageError
from cmkd_scale.memory.bank import memory_bytes
from cmkd_scale.operations.plan_memory import FLOAT, Sizes
from cmkd_scale.operations.plan_trace import Traced, trace
from cmkd_scale.records import Batch
from cmkd_scale.stages.common import Trained, make_spec
from cmkd_scale.stages.company import make_loader
from cmkd_scale.stages.forward_pass import BATCH_SIZE
from cmkd_scale.stages.streams import SplitData, make_draw
from cmkd_scale.stages.through_faults import Recipe, Run, engine_options, make_module
from cmkd_scale.stages.train import taught_memories
from cmkd_scale.stages.watching import Watch
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine
from cmkd_scale.training.loop import Trainer
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.watchdog import Watchdog

_WARM_STEPS = 3  # kernels are chosen, buffers touched, decoded samples cached
_LEAST_STEPS, _MOST_STEPS = 4, 200
_NO_END = dict.fromkeys(("steps", "log_every_steps", "checkpoint_every_steps"), 1_000_000)
_CONTEXT_BYTES = 600 * 2**20  # a CUDA context with its libraries
_COPIED = 16 * 2**20  # numbers: 64 MiB
_BYTES_A_PARAMETER = 16  # weights, gradient, two moments


@dataclass(frozen=True, slots=True)
class Calibration:
    """What some steps have come to, on this rank."""

    device: str
    sizes: Sizes
    samples: int
    """Of this rank in a step."""
    steps: int
    """That were timed."""
    step_seconds: float
    """Median, with the wait for data."""
    step_spread: float
    """Median absolute deviation over the median."""
    data_seconds: float
    """Of it waiting for data."""
    forward_seconds: float
    backward_seconds: float
    """With the update, and what of the exchange of gradients it does not hide."""
    start_seconds: float
    """From the start of this process until there is a model: libraries, data, memory."""
    flops_per_sample: float
    exchange_bytes: int
    """What a rank says of its batch for each step, beside gradients."""
    copy_bytes_per_second: float
    """Of tensors from the device into CPU memory: how long a checkpoint stalls training."""


def of_one_rank(config: Config, world_size: int) -> Config:
    """The config of one rank of many, as a run of its own: its part of each batch.

    Raises:
        UsageError: batches cannot be divided.
    """
    pieces = world_size * config.train.gradient_accumulation_steps
    changes: dict[str, int] = {}
    for name in ("global_batch_size", "unlabelled_batch_size"):
        size = getattr(config.train, name)
        if size is None:
            continue
        if size % pieces:
            near = max(pieces, round(size / pieces) * pieces)
            raise UsageError(
                f"train.{name}={size} cannot be divided over {world_size} ranks of "
                f"{config.train.gradient_accumulation_steps} parts each; use {near}, or another "
                "number of nodes."
            )
        changes[f"train.{name}"] = size // world_size
    return with_changes(config, {**changes, "run.world_size": None})


def calibrate(
    config: Config,
    recipe: Recipe,
    engine: Engine,
    data: SplitData,
    *,
    test_samples: int,
    seconds: float,
) -> Calibration:
    """Take steps for about so many seconds; a collective call.

    Args:
        config: of the run.
        recipe: what it trains.
        engine: joined, with nothing prepared.
        data: that it trains on.
        test_samples: that are evaluated after training.
        seconds: at most, but a few steps are taken in any case.

    Raises:
        UsageError: the model is too large for this machine, or data and method do not fit.
    """
    spec = make_spec(config, data, recipe.feature_dim)
    memories = taught_memories(config, recipe, spec)
    with tempfile.TemporaryDirectory(prefix="cmkd-calibration-") as name, Preemption() as stops:
        directory = Path(name)
        watchdog = Watchdog(0.0, directory=directory)
        run = Run(
            config, recipe, memories, engine, data, spec, directory, Watch(watchdog), console=False
        )
        module = make_module(run)  # loads the library that models come from
        start_seconds = time.time() - psutil.Process().create_time()
        weights = FLOAT * sum(parameter.numel() for parameter in module.parameters())
        runtime_bytes = _resident_bytes() - weights
        _refuse_what_does_not_fit(module)
        loader = make_loader(config, recipe.method, recipe.teacher, data, directory)
        with _one(loader.batches()) as batch:
            traced = trace(*_part(module.to(engine.device), batch, run))
        # Kernels have been chosen and built meanwhile, which stay.
        kept = _resident_bytes() - weights - traced.activation_bytes
        runtime_bytes = max(0, runtime_bytes, kept)
        parts = config.train.gradient_accumulation_steps
        samples = len(batch.labels)
        evaluated = min(BATCH_SIZE, test_samples) * parts / samples
        sizes = _sizes(run, module, runtime_bytes, traced, evaluated)
        engine.prepare(module, engine_options(config))
        loader = make_loader(config, recipe.method, recipe.teacher, data, directory)
        stopwatch = _Stopwatch(watchdog, seconds)
        trainer = Trainer(
            engine,
            loader,
            config.train.model_copy(update=_NO_END),
            checkpoints=directory / "checkpoints",
            seed=config.run.seed,
            constants={},
            blobs={},
            watchdog=watchdog,
        )
        try:
            trainer.run(stopwatch, stops)
        except _EnoughError:
            engine.accelerator.free_memory()
    median = statistics.median(stopwatch.seconds)
    spread = statistics.median(abs(value - median) for value in stopwatch.seconds) / median
    return Calibration(
        device=str(engine.device.type),
        sizes=sizes,
        samples=samples,
        steps=len(stopwatch.seconds),
        step_seconds=median,
        step_spread=spread,
        data_seconds=statistics.median(stopwatch.waited),
        forward_seconds=stopwatch.phase("forward"),
        backward_seconds=stopwatch.phase("backward"),
        start_seconds=start_seconds,
        flops_per_sample=traced.flops * parts / samples,
        exchange_bytes=_exchange_bytes(run),
        copy_bytes_per_second=_copy_speed(engine.device),
    )


class _EnoughError(Exception):
    """Ends the steps, on all ranks after the same one."""


class _Stopwatch:
    """A sink that times steps, and ends them when there are enough."""

    def __init__(self, watchdog: Watchdog, seconds: float) -> None:
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self._watchdog = watchdog
        self._limit = seconds
        self._warm: list[float] = []
        self._wanted = _MOST_STEPS
        self._before: dict[str, float] = {}

    def step(self, step: int, seconds: float, waited_seconds: float) -> None:
        if step <= _WARM_STEPS:
            self._warm.append(seconds)
        if step == _WARM_STEPS:
            fits = max(_LEAST_STEPS, min(_MOST_STEPS, math.ceil(self._limit / self._warm[-1])))
            self._wanted = min(distributed.gather_integers(fits))
            self._before = self._watchdog.phase_seconds()
        if step > _WARM_STEPS:
            self.seconds.append(seconds)
            self.waited.append(waited_seconds)
        if len(self.seconds) == self._wanted:
            raise _EnoughError

    def phase(self, name: str) -> float:
        """Mean seconds of a step in a phase."""
        spent = self._watchdog.phase_seconds()
        return (spent[name] - self._before[name]) / len(self.seconds)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def _one(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The first of endless batches, whose workers end afterwards."""
    try:
        yield next(batches)
    finally:
        batches.close()  # type: ignore[attr-defined]


def _part(
    module: Distillation, batch: Batch, run: Run
) -> tuple[Distillation, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The first of the parts that gradients are accumulated over, on the device."""
    parts, device = run.config.train.gradient_accumulation_steps, run.engine.device
    beside = {name: value.chunk(parts)[0].to(device) for name, value in batch.beside.items()}
    inputs, labels = (value.chunk(parts)[0].to(device) for value in (batch.inputs, batch.labels))
    return module, inputs, labels, beside


def _resident_bytes() -> int:
    """Of this process."""
    return int(psutil.Process().memory_info().rss)


def _refuse_what_does_not_fit(module: Distillation) -> None:
    numbers = sum(parameter.numel() for parameter in module.parameters())
    available = psutil.virtual_memory().available
    if _BYTES_A_PARAMETER * numbers > available:
        raise UsageError(
            f"The model has {numbers / 1e6:.0f} million parameters, and the "
            f"{available / 2**30:.1f} GiB that are free here hold none of its steps: plan on a "
            "machine with more memory, or a smaller model.width or model.depth."
        )


def _sizes(
    run: Run, module: Distillation, runtime_bytes: int, traced: Traced, evaluated: float
) -> Sizes:
    """What takes up memory.

    Args:
        run: what it is made of.
        module: that it trains.
        runtime_bytes: of this process before there was a model.
        traced: of a part of this rank's batch.
        evaluated: samples in a batch of evaluation, over those in that part.
    """
    trained = _trained(module)
    blocks = [_trained(block) for block in module.model.blocks]
    kept = FLOAT * sum(value.numel() for value in module.parameters()) - FLOAT * trained
    frozen = sum(value.numel() * value.element_size() for value in module.buffers())
    teacher = run.recipe.teacher
    if isinstance(teacher, Trained) and not run.recipe.method.trains_teacher:
        frozen += FLOAT * sum(value.numel() for value in teacher.model.parameters())
    config, data = run.config, run.data
    sample = FLOAT * math.prod(data.modality.shape)
    cached = min(config.data.cache_bytes, sample * make_draw(config, data).samples)
    return Sizes(
        parameters=trained,
        root_parameters=trained - sum(blocks),
        largest_block=max(blocks, default=0),
        frozen_bytes=frozen,
        activation_bytes=traced.activation_bytes,
        evaluation_bytes=FLOAT * trained + kept + round(evaluated * traced.inference_bytes),
        averaged=config.train.ema_decay is not None,
        blob_bytes=sum(len(memory_bytes(memory)) for memory in run.memories),
        gather_bytes=2 if run.engine.compute is torch.bfloat16 else FLOAT,
        runtime_bytes=runtime_bytes,
        context_bytes=_CONTEXT_BYTES if run.engine.device.type == "cuda" else 0,
        cached_bytes=cached * max(1, config.data.workers),
        kept_bytes=kept,
    )


def _trained(module: nn.Module) -> int:
    """Numbers of a module that are trained."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)


def _exchange_bytes(run: Run) -> int:
    """Of one vote of each prototype and class, and of a row of each sample that is kept."""
    return sum(
        FLOAT * (2 * len(memory.prototypes) + 256 * (memory.feature_dim + 1))
        for memory in run.memories
    )


def _copy_speed(device: torch.device) -> float:
    """Bytes a second from the device into memory that has been touched."""
    source = torch.ones(_COPIED, device=device)
    target = torch.empty(_COPIED, pin_memory=device.type == "cuda").copy_(source)
    begun = time.perf_counter()
    target.copy_(source)
    return FLOAT * _COPIED / (time.perf_counter() - begun)
