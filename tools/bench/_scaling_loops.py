"""The loops that ``scaling.py`` times: a run's ``Trainer``, and torch's DDP with nothing around."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cmkd_scale import distributed
from cmkd_scale.config_sections import TrainConfig
from cmkd_scale.models.model import Model
from cmkd_scale.monitoring.jsonl import JsonlSink, read_jsonl
from cmkd_scale.monitoring.sinks import Sink, Sinks
from cmkd_scale.records import Batch
from cmkd_scale.training.distillation import Distillation
from cmkd_scale.training.engine import Engine, Options
from cmkd_scale.training.loop import Trainer
from cmkd_scale.training.method_checks import resolve_method
from cmkd_scale.training.parameter_groups import parameter_groups
from cmkd_scale.training.preemption import Preemption
from cmkd_scale.training.schedule import learning_rate_at
from cmkd_scale.training.watchdog import Watchdog
from tools.bench._step_variants import Setting

WEIGHT_DECAY, CLIP = 0.05, 5.0
_DISTINCT = 4  # batches, which come again and again
_WATCHDOG_SECONDS = 600.0


class Marks:
    """Time and CPU time of this process whenever a batch was asked for."""

    def __init__(self) -> None:
        """None yet."""
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def mark(self) -> None:
        """Now."""
        self._wall.append(time.perf_counter())
        self._cpu.append(time.process_time())

    def per_step(self) -> tuple[float, float]:
        """Mean seconds and CPU seconds from the first to the last mark.

        These are whole turns of a loop. The last turn is left out, with the checkpoint that a run
        ends with: how long that takes, ``checkpoint.py`` says.
        """
        steps = len(self._wall) - 1
        return (self._wall[-1] - self._wall[0]) / steps, (self._cpu[-1] - self._cpu[0]) / steps


class Noise:
    """This rank's part of batches of noise with labels, held in memory; a loader of a ``Trainer``.

    Rank r of W takes the samples r, r + W, ..., as any number of ranks shares the same batches.
    """

    def __init__(self, setting: Setting) -> None:
        """Make the batches."""
        rank, world = distributed.rank(), distributed.world_size()
        self._batches = []
        for number in range(_DISTINCT):
            generator = torch.Generator().manual_seed(number)
            inputs = torch.randn(setting.batch, *setting.student_shape, generator=generator)
            labels = torch.randint(setting.classes, (setting.batch,), generator=generator)
            mine = slice(rank, None, world)
            keys = tuple(map(str, range(setting.batch)[mine]))
            self._batches.append(Batch(inputs[mine].contiguous(), labels[mine], keys))
        self.marks = Marks()

    def batches(self) -> Generator[Batch, None, None]:
        """Endless, and marked from now on."""
        self.marks = Marks()
        while True:
            for batch in self._batches:
                self.marks.mark()
                yield batch

    def state(self) -> dict[str, Any]:
        """Nothing is resumed here."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ``state``."""

    def epoch_progress(self) -> float:
        """There are no epochs."""
        return 0.0

    def bad_samples_ratio(self) -> float:
        """None is damaged."""
        return 0.0

    def exchange(self) -> dict[str, float]:
        """Nothing goes wrong."""
        return {}


def make_model(setting: Setting) -> Model:
    """The same on all ranks and in all loops."""
    torch.manual_seed(0)
    return setting.model(setting.student_shape)


class Ours:
    """Training as ``cmkd student`` runs it, from the engine to the log."""

    def __init__(
        self,
        engine: Engine,
        setting: Setting,
        directory: Path,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Give the model, in ``dtype``, to ``engine``, which forgets any other; collective."""
        self._engine, self._setting, self._directory = engine, setting, directory
        self._loader = Noise(setting)
        self._runs = 0
        engine.prepare(
            Distillation(make_model(setting).to(dtype), resolve_method("ce", {})),
            Options(
                global_batch_size=setting.batch,
                parts=1,
                weight_decay=WEIGHT_DECAY,
                layer_decay=1.0,
                clip=CLIP,
                ema_decay=None,
            ),
        )

    def run(self, config: TrainConfig, beside: Sequence[Sink] = ()) -> list[float]:
        """Train for some steps more, in a run of their own; a collective call.

        Args:
            config: steps, schedule and rhythm.
            beside: what takes steps beside the log file; closed at the end.

        Returns:
            Losses that were logged, means over the global batch; none on ranks that log nothing.
        """
        directory = self._directory / f"run_{self._runs}"
        self._runs += 1
        with Preemption() as preemption, Watchdog(_WATCHDOG_SECONDS, directory=directory) as dog:
            trainer = Trainer(
                self._engine,
                self._loader,
                config,
                checkpoints=directory / "checkpoints",
                seed=0,
                constants={},
                blobs={},
                watchdog=dog,
            )
            file = directory / "metrics.jsonl"
            sink = Sinks([*([JsonlSink(file)] if distributed.is_main() else []), *beside])
            trainer.run(sink, preemption)
        sink.close()
        if not distributed.is_main():
            return []
        return [record["loss"] for record in read_jsonl(file)]

    def __call__(self, config: TrainConfig, beside: Sequence[Sink] = ()) -> tuple[float, float]:
        """Seconds and CPU seconds a step of this process."""
        self.run(config, beside)
        return self._loader.marks.per_step()


class Bare:
    """The same model, batches, optimizer, schedule and clipping in a loop of a few lines."""

    def __init__(self, setting: Setting) -> None:
        """Wrap the model if there are several ranks; a collective call."""
        model = make_model(setting)
        self._module: nn.Module = model
        if distributed.world_size() > 1:
            self._module = DistributedDataParallel(model, gradient_as_bucket_view=True)
        groups = parameter_groups(model, model, weight_decay=WEIGHT_DECAY, layer_decay=1.0)
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
        self._loader = Noise(setting)

    def run(self, config: TrainConfig) -> Tensor:
        """Train for some steps more; a collective call. Losses [steps] of this rank's samples."""
        losses = []
        batches = self._loader.batches()
        for step in range(config.steps):
            batch = next(batches)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            loss = functional.cross_entropy(self._module(batch.inputs).logits, batch.labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self._module.parameters(), CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).double()

    def __call__(self, config: TrainConfig) -> tuple[float, float]:
        """Seconds and CPU seconds a step of this process."""
        self.run(config)
        return self._loader.marks.per_step()
