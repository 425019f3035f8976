"""The one step loop of the project: teachers, students, every method and control."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.config_sections import TrainConfig
from cmkd_scale.errors import CmkdError, IntegrityError, PreemptedError
from cmkd_scale.memory.checksum import checksum
from cmkd_scale.records import Batch
from cmkd_scale.training.checkpoint import Checkpoint, save_checkpoint
from cmkd_scale.training.distillation import StepResult, Underway
from cmkd_scale.training.engine import Engine
from cmkd_scale.training.preemption import Preemption


class Loader(Protocol):
    """An endless source of this rank's batches that knows where it stands."""

    def batches(self) -> Iterator[Batch]:
        """Endless batches from the place where the loader stands."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the last delivered batch ended; the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where ``state`` says."""
        ...

    def epoch_progress(self) -> float:
        """Position in the current epoch, 0 to 1."""
        ...

    def exchange(self) -> dict[str, float]:
        """What went wrong with data on any rank since the last call; a collective call."""
        ...


class Sink(Protocol):
    """Takes the values of a logged step; called on rank 0 only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values`` of step ``step``."""
        ...


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to zero at the last step (Loshchilov and Hutter 2017)."""
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / (config.steps - warmup)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


class Trainer:
    """Runs the steps that are left, logs them and saves checkpoints."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        config: TrainConfig,
        *,
        checkpoints: Path,
        seed: int,
        constants: Mapping[str, Any],
        blobs: Mapping[str, bytes],
    ) -> None:
        """Set up a run at step 0.

        Args:
            engine: holds the prepared module.
            loader: of this rank's batches.
            config: steps, schedule and rhythm.
            checkpoints: directory of the checkpoints.
            seed: of whatever is random in a step.
            constants: stored in each checkpoint's state, e.g. digests.
            blobs: files stored in each checkpoint as they are.
        """
        self.engine = engine
        self.loader = loader
        self.config = config
        self.checkpoints = checkpoints
        self.seed = seed
        self.constants = dict(constants)
        self.blobs = dict(blobs)
        self.step = 0
        self._pending: dict[str, float] = {}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue after the step at which ``checkpoint`` was written.

        Raises:
            IntegrityError: it was written by a run with another model, memory or config.
        """
        # Through JSON, as the checkpoint's state went: tuples have become lists.
        for name, value in json.loads(json.dumps(self.constants)).items():
            if checkpoint.state.get(name) != value:
                raise IntegrityError(
                    f"The checkpoint at step {checkpoint.state.get('step')} was written with "
                    f"another {name.replace('_', ' ')} than this run has; restore what it was "
                    "trained with, or start in a new run directory."
                )
        self.engine.load_state(
            checkpoint.files["model.safetensors"],
            checkpoint.files["optimizer/state.safetensors"],
        )
        self.loader.load_state(checkpoint.state["loader"])
        self.step = int(checkpoint.state["step"])

    def run(self, make_sink: Callable[[int], Sink | None]) -> None:
        """Train to the last step.

        Args:
            make_sink: called once with the step to resume from; None on ranks that don't log.

        Raises:
            PreemptedError: a signal asked for a stop; the state is saved.
            CmkdError: the loss is no longer finite.
        """
        sink = make_sink(self.step)
        with Preemption() as preemption:
            batches = self.loader.batches() if self.step < self.config.steps else iter(())
            clock = _Clock()
            while self.step < self.config.steps:
                clock.waiting()
                batch = next(batches)
                clock.computing()
                learning_rate = learning_rate_at(self.step, self.config)
                # Random numbers of a step depend on the seed and the step alone, so no
                # generator state has to be saved to resume exactly.
                torch.manual_seed(self.seed * 1_000_003 + self.step)
                result, norm, underway = self.engine.step(
                    batch.inputs,
                    batch.labels,
                    self.step,
                    learning_rate=learning_rate,
                    clip=self.config.gradient_clip_norm,
                )
                self._finish(underway)
                self.step += 1
                if self._due(self.config.check_ranks_every_steps):
                    self._check_ranks(sink)
                clock.steps += 1
                if self._due(self.config.log_every_steps) or self.step == 1:
                    values = self._values(result, norm, learning_rate, clock)
                    if sink is not None:
                        sink.log(self.step, values)
                stop = preemption.agreed()
                if stop or self._due(self.config.checkpoint_every_steps):
                    self._refuse_divergence(result.loss, norm)
                    self.save()
                if stop:
                    raise PreemptedError(
                        f"Stopped by a signal after step {self.step}; the state is saved. Run the "
                        "same command again to continue."
                    )

    def _finish(self, underway: Underway) -> None:
        """Take in what all ranks say of the batch; how long that took, and how much it was."""
        if not underway.exchanges:
            return
        begun = time.perf_counter()
        underway.wait()
        self._add("memory_sync_seconds", time.perf_counter() - begun)
        self._add("memory_sync_bytes", underway.bytes_on_wire)
        self.engine.module.finish_step(underway)

    def _check_ranks(self, sink: Sink | None) -> None:
        """Stop all ranks when any holds another memory, other potentials or statistics.

        Raises:
            IntegrityError: naming the ranks that differ from rank 0.
        """
        if distributed.world_size() == 1 or not self.engine.module.memories:
            return
        sums = distributed.gather_integers(checksum(self.engine.module.synchronised()))
        others = [rank for rank, value in enumerate(sums) if value != sums[0]]
        if others:
            if sink is not None:
                sink.log(self.step, {"memory_rank_mismatches": float(len(others))})
            raise IntegrityError(
                f"At step {self.step} the memory, potentials or statistics of rank "
                f"{', '.join(map(str, others))} differ from those of rank 0, so the ranks no "
                "longer train the same student. Check that machine (memory errors, another "
                "version of a library), then run the same command again: it continues from the "
                "newest checkpoint."
            )

    def save(self) -> None:
        """Write a checkpoint from rank 0; all ranks wait until it is complete."""
        begun = time.perf_counter()
        self._exchange()  # what a checkpoint has passed must be on record
        distributed.run_on_main(self._write)
        self._pending["checkpoint_seconds"] = time.perf_counter() - begun

    def _write(self) -> None:
        state = {
            "step": self.step,
            "samples_seen": self.step * self.config.global_batch_size,
            "loader": self.loader.state(),
            **self.constants,
        }
        files = {
            "model.safetensors": self.engine.model_state(),
            "optimizer/state.safetensors": self.engine.optimizer_state(),
        }
        save_checkpoint(
            self.checkpoints,
            Checkpoint(state=state, files=files, blobs=self.blobs),
            keep=self.config.keep_checkpoints,
        )

    def _refuse_divergence(self, loss: Tensor, norm: Tensor) -> None:
        """Stop all ranks when loss or gradient of any is not finite, before it is saved."""
        if distributed.any_rank(not bool(torch.isfinite(loss + norm))):
            raise CmkdError(
                f"Loss or gradient is no longer finite at step {self.step}. Earlier checkpoints "
                "are untouched; lower train.learning_rate or train.gradient_clip_norm and start "
                "again in a new run directory."
            )

    def _exchange(self) -> None:
        for name, value in self.loader.exchange().items():
            self._add(name, value)

    def _add(self, name: str, value: float) -> None:
        """Count up to the next logged step."""
        self._pending[name] = self._pending.get(name, 0.0) + value

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _values(
        self,
        result: StepResult,
        norm: Tensor,
        learning_rate: float,
        clock: _Clock,
    ) -> dict[str, float]:
        """What is logged of a step: losses are means over the global batch."""
        names = ["loss", *(f"loss/{name}" for name in result.components)]
        losses = torch.stack([result.loss.detach(), *result.components.values()]).double()
        means = distributed.all_reduce_sum(losses) / distributed.world_size()
        values = dict(zip(names, means.tolist(), strict=True))
        self._refuse_divergence(result.loss, norm)
        values["learning_rate"] = learning_rate
        values["grad_norm"] = float(norm)
        values.update(self.engine.module.measures(result.step))
        values["samples_seen"] = float(self.step * self.config.global_batch_size)
        values["epoch_progress"] = self.loader.epoch_progress()
        self._exchange()
        if "memory_sync_seconds" in self._pending:
            self._pending["memory_sync_seconds"] /= clock.steps
        values.update(clock.lap(self.config.global_batch_size))
        values["eta_seconds"] = values["step_seconds"] * (self.config.steps - self.step)
        # What happened between two logged steps is reported with the later one.
        values.update(self._pending)
        self._pending.clear()
        return values


class _Clock:
    """Time of the steps since the last log line, and how much of it went into waiting."""

    def __init__(self) -> None:
        self.steps = 0
        self._wait = 0.0
        self._since = self._mark = time.perf_counter()

    def waiting(self) -> None:
        self._mark = time.perf_counter()

    def computing(self) -> None:
        self._wait += time.perf_counter() - self._mark

    def lap(self, global_batch_size: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        values = {
            "samples_per_second": self.steps * global_batch_size / seconds,
            "step_seconds": seconds / self.steps,
            "data_wait_seconds": self._wait,
        }
        self.steps, self._wait, self._since = 0, 0.0, now
        return values
