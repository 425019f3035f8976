"""The one step loop of the project: teachers, students, every method and control."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cmkd_scale import distributed
from cmkd_scale.config_sections import TrainConfig
from cmkd_scale.errors import CmkdError, IntegrityError, PreemptedError, UsageError
from cmkd_scale.memory.checksum import checksum
from cmkd_scale.records import Batch
from cmkd_scale.training.divergence import Divergence
from cmkd_scale.training.engine import Engine, Stepped
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.protocols import Loader, OrderLog, Sink
from cmkd_scale.training.rank_times import RankTimes
from cmkd_scale.training.saving import Saving
from cmkd_scale.training.schedule import learning_rate_at
from cmkd_scale.training.step_log import StepLog
from cmkd_scale.training.watchdog import Watchdog

_log = logging.getLogger(__name__)


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
        watchdog: Watchdog,
        order_log: OrderLog | None = None,
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
            watchdog: told where the loop stands.
            order_log: of the samples that are read, if they are wanted.
        """
        self.engine = engine
        self.loader = loader
        self.config = config
        self.seed = seed
        self.constants = dict(constants)
        self.watchdog = watchdog
        self.order_log = order_log
        self.step = 0
        self.restarts = {"resume": 0, "rollback": 0}
        """Of the whole run, by reason."""
        self.log = StepLog(steps=config.steps, global_batch_size=config.global_batch_size)
        self.divergence = Divergence(
            max_skipped_steps=config.max_skipped_steps, explosion_factor=config.explosion_factor
        )
        self.rank_times = RankTimes()
        self.saving = Saving(
            checkpoints,
            keep=config.keep_checkpoints,
            max_failures=config.max_checkpoint_failures,
            blobs=blobs,
            log=self.log,
        )
        self._waited = 0.0  # seconds, for the data of the last step
        self._fault: CmkdError | None = None  # that ends the run at the next step

    def resume(self, state: Mapping[str, Any]) -> None:
        """Stand after the step of a checkpoint with this state; tensors are the engine's matter.

        Raises:
            IntegrityError: it was written by a run with another model, memory or config.
        """
        # Through JSON, as the checkpoint's state went: tuples have become lists.
        for name, value in json.loads(json.dumps(self.constants)).items():
            if state.get(name) != value:
                raise IntegrityError(
                    f"The checkpoint at step {state.get('step')} was written with another "
                    f"{name.replace('_', ' ')} than this run has; restore what it was trained "
                    "with, or start in a new run directory."
                )
        self.loader.load_state(state["loader"])
        self.step = int(state["step"])
        self.restarts.update(state.get("restarts", {}))
        self.restarts["resume"] += 1

    def run(self, sink: Sink | None, preemption: Preemption) -> None:
        """Train to the last step.

        Args:
            sink: takes what there is to tell of steps; None: nobody does.
            preemption: watched between steps.

        Raises:
            PreemptedError: a signal asked for a stop; the state is saved.
            DivergedError: too many steps went wrong in a row.
            CmkdError: the run cannot go on; the message says why.
        """
        batches = self.loader.batches()
        begun = time.perf_counter()
        try:
            while self.step < self.config.steps:
                stepped = self._one(next_batch=lambda: next(batches))
                stop = self._agree(stepped, preemption, sink)
                self._after(stepped, sink)
                if sink is not None:
                    now = time.perf_counter()
                    sink.step(self.step, now - begun, self._waited)
                    begun = now
                if stop:
                    self._stop()
            self._settle()
        finally:
            batches.close()  # ends workers
            if self.order_log is not None:
                self.order_log.close()
            self.saving.wait()

    def _one(self, next_batch: Callable[[], Batch]) -> Stepped:
        """One step, up to the exchange between ranks."""
        self.watchdog.at("data", self.step)
        self.log.clock.waiting()
        batch = next_batch()
        self._waited = self.log.clock.computing()
        if self.order_log is not None:
            self.order_log.log(self.step, batch.keys)
        # Random numbers of a step depend on the seed and the step alone, so no generator state
        # has to be saved to resume exactly.
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        stepped = self.engine.step(
            batch.inputs,
            batch.labels,
            self.step,
            batch.beside,
            learning_rate=learning_rate_at(self.step, self.config),
            at=self.watchdog.at,
        )
        self.rank_times.add(self._waited + stepped.own_seconds)
        self.watchdog.at("exchange", self.step)
        self._finish(stepped)
        self.step += 1
        self.log.clock.steps += 1
        return stepped

    def _finish(self, stepped: Stepped) -> None:
        """Take in what all ranks say of the batch; how long that took, and how much it was."""
        underway = stepped.underway
        if not underway.exchanges:
            return
        begun = time.perf_counter()
        underway.wait()
        self.log.count_mean("memory_sync_seconds", time.perf_counter() - begun)
        self.log.count("memory_sync_bytes", underway.bytes_on_wire)
        if stepped.applied:  # else what was sent is not finite either
            self.engine.module.finish_step(underway)

    def _agree(self, stepped: Stepped, preemption: Preemption, sink: Sink | None) -> bool:
        """Whether all stop after this step because one was signalled; a collective call.

        Raises:
            DivergedError: on all ranks.
            CmkdError: on all ranks: one cannot go on.
        """
        self.saving.look()
        fault = self._fault or self.saving.fault
        votes = torch.tensor(
            [float(preemption.received), float(fault is not None), float(stepped.result.loss)],
            dtype=torch.float64,
        )
        signalled, faults, loss = distributed.all_reduce_sum(votes).tolist()
        if faults:
            distributed.run_together(self._raise_fault)
        if not stepped.applied:
            self._write_log(sink, {"steps_skipped": 1.0})  # at once: the next step may end the run
            if distributed.is_main():
                _log.warning("Step %d: the gradient is not finite; left out.", self.step)
        mean = loss / distributed.world_size()
        self.divergence.observe(self.step, mean, applied=stepped.applied)
        return bool(signalled)

    def _raise_fault(self) -> None:
        fault = self._fault or self.saving.fault
        if fault is not None:
            raise fault

    def _after(self, stepped: Stepped, sink: Sink | None) -> None:
        """What is due after a step."""
        if self._due(self.config.check_ranks_every_steps):
            self._check_ranks(sink)
        if self._due(self.config.log_every_steps) or self.step == 1:
            self._log_step(stepped, sink)
        if self._checkpoint_is_due():
            self.save()

    def _log_step(self, stepped: Stepped, sink: Sink | None) -> None:
        self._exchange()
        for name, value in self.rank_times.share().items():
            self.log.set(name, value)
        for reason, count in self.restarts.items():
            self.log.set(f"restarts/{reason}", count)
        values = self.log.values(self.step, stepped.result, stepped.norm)
        values["learning_rate"] = stepped.learning_rate
        values["epoch_progress"] = self.loader.epoch_progress()
        if bad := self.loader.bad_samples_ratio():
            values["bad_samples_ratio"] = bad
        values.update(self.engine.module.measures(stepped.result.step))
        self._write_log(sink, values)

    def _write_log(self, sink: Sink | None, values: Mapping[str, float]) -> None:
        if sink is None:
            return
        try:
            sink.log(self.step, values)
        except OSError as error:
            self._fault = UsageError(
                f"The log of step {self.step} cannot be written: {error}. Free space and run the "
                "same command again: it continues from the newest checkpoint."
            )

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
            self._write_log(sink, {"memory_rank_mismatches": float(len(others))})
            raise IntegrityError(
                f"At step {self.step} the memory, potentials or statistics of rank "
                f"{', '.join(map(str, others))} differ from those of rank 0, so the ranks no "
                "longer train the same student. Check that machine (memory errors, another "
                "version of a library), then run the same command again: it continues from the "
                "newest checkpoint."
            )

    def save(self) -> None:
        """Begin a checkpoint; a collective call. Training may go on while rank 0 writes it."""
        self.watchdog.at("checkpoint", self.step)
        self._exchange()  # what a checkpoint has passed must be on record
        state = {
            "step": self.step,
            "samples_seen": self.step * self.config.global_batch_size,
            "loader": self.loader.state(),
            "restarts": dict(self.restarts),  # written later, while this one goes on counting
            **self.constants,
        }
        self.saving.save(state, self.engine.state())

    def _settle(self) -> None:
        """Wait until all is on the disk; a collective call.

        Raises:
            UsageError: it could not be written.
        """
        self.saving.settle()
        distributed.run_together(self._raise_fault)

    def _stop(self) -> None:
        """Save, and end the run until it is started again."""
        if not self._checkpoint_is_due():  # else it was begun
            self.save()
        self._settle()
        raise PreemptedError(
            f"Stopped by a signal after step {self.step}; the state is saved. Run the same "
            "command again to continue."
        )

    def _checkpoint_is_due(self) -> bool:
        """After a step that went wrong there is none, so that a roll back leads behind it."""
        last = self.step == self.config.steps
        return self._due(self.config.checkpoint_every_steps) and (
            last or not self.divergence.suspect
        )

    def _exchange(self) -> None:
        for name, value in self.loader.exchange().items():
            self.log.count(name, value)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps
