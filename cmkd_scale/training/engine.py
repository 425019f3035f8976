"""The door to Accelerate: device, processes, and the backend that a launch has asked for.

The only importer of ``accelerate``, its trackers aside (``trackers.py``). The same code runs alone,
under ``accelerate launch`` and under torchrun; how the model is spread over processes is what
Accelerate's config says (``launchers/accelerate``): one process, DDP, FSDP2, or DeepSpeed's ZeRO
stages. A launch whose world is not what it seems is refused at once.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor

from cmkd_scale import distributed
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.launch_check import check_world
from cmkd_scale.training import fsdp
from cmkd_scale.training.averaging import WeightAverage
from cmkd_scale.training.backends import Backend, Replicated, Sharded
from cmkd_scale.training.distillation import Distillation, StepResult, Underway
from cmkd_scale.training.parameter_groups import parameter_groups
from cmkd_scale.training.updates import Bilevel, check_update

MODEL_FILE = "model.safetensors"
AVERAGE_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer/state.safetensors"

_INPUTS = "inputs"
_LABELS = "labels"

State = dict[str, dict[str, Tensor]]
"""File of a checkpoint -> name -> tensor."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a module is trained."""

    global_batch_size: int
    """Samples a step, over all processes and parts."""
    parts: int
    """That each process cuts its share of the batch into."""
    weight_decay: float
    layer_decay: float
    clip: float
    """Largest norm of the whole gradient."""
    ema_decay: float | None


class Stepped(NamedTuple):
    """What a step has come to."""

    result: StepResult
    """Means over this process's parts; without gradient."""
    norm: Tensor
    """[] of the gradient of all processes, before clipping."""
    applied: bool
    """Whether the gradient was finite: if not, nothing has moved. The same on all ranks."""
    underway: Underway
    """The exchange between ranks that ran beside backward, for ``Distillation.finish_step``."""
    learning_rate: float
    own_seconds: float
    """Up to the backward pass of the last part, in which ranks begin to wait for each other."""


class Engine:
    """One training module, spread over processes in step with each other."""

    def __init__(
        self,
        *,
        mixed_precision: str = "no",
        world_size: int | None = None,
        collective_timeout_seconds: float = 1800.0,
    ) -> None:
        """Join the launched world.

        Args:
            mixed_precision: ``no`` or ``bf16``.
            world_size: number of processes that the config demands, or None.
            collective_timeout_seconds: after which processes that wait give the others up.

        Raises:
            UsageError: the launch is not what it seems (``check_world``), or asks for a backend
                that is not there.
        """
        self.zero = _asked("ACCELERATE_USE_DEEPSPEED")
        self.shards = _asked("ACCELERATE_USE_FSDP")
        self.compute = torch.bfloat16 if mixed_precision == "bf16" else None
        self._timeout = collective_timeout_seconds
        self.accelerator = self._accelerator(collective_timeout_seconds)
        check_world(self.accelerator.num_processes, world_size)
        self.average: WeightAverage | None = None

    def _accelerator(self, timeout: float) -> Accelerator:
        launched = "LOCAL_RANK" in os.environ
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
        if not torch.cuda.is_available():
            group.backend = "gloo" if launched else None
            if self.zero:
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            else:
                # Without it, several CPU processes would each train alone (see check_world).
                os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        # Precision is the run's own: autocast in the module, the same for every backend. Every
        # buffer is equal on all ranks by construction.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # Accelerate asks for rank numbers in every record; one voice is enough.
        logging.getLogger("accelerate").setLevel(logging.WARNING)
        try:
            return Accelerator(mixed_precision="no", kwargs_handlers=[group, ddp])
        except ImportError as error:
            raise UsageError(
                f"The launch asks for a backend that is not installed: {error}. Install it with "
                "`pip install 'cmkd_scale[deepspeed]'`, or launch with another config of "
                "launchers/accelerate."
            ) from None

    @property
    def backend_name(self) -> str:
        """``single``, ``ddp``, ``fsdp2``, or ``zero1`` to ``zero3``."""
        if self.zero:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.shards:
            return "fsdp2"
        return "ddp" if distributed.world_size() > 1 else "single"

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    def check_batch_size(self, global_batch_size: int, parts: int = 1) -> None:
        """Refuse a batch that ranks, and the parts of each, cannot share.

        Raises:
            UsageError: the batch cannot be divided evenly.
        """
        world = distributed.world_size()
        pieces = world * parts
        if global_batch_size % pieces:
            lower = global_batch_size - global_batch_size % pieces
            choices = [size for size in (lower, lower + pieces) if size > 0]
            each = f" of {parts} parts each" if parts > 1 else ""
            raise UsageError(
                f"train.global_batch_size {global_batch_size} cannot be divided over {world} "
                f"processes{each}; use {' or '.join(map(str, choices))}, or another number of "
                "processes."
            )

    def prepare(self, module: Distillation, options: Options, state: State | None = None) -> None:
        """Take a module for training with AdamW (Loshchilov and Hutter 2019); a collective call.

        Args:
            module: on any device.
            options: how it is trained.
            state: of a checkpoint, by any backend on any number of processes; None: a new run.

        Raises:
            IntegrityError: the state belongs to another model.
            UsageError: the launch asks for FSDP version 1, or for a backend that cannot run the
                method.
        """
        check_update(module.method, self.backend_name, options.parts)
        self.bilevel = Bilevel(module) if module.method.update == "bilevel" else None
        self.module = module
        self.options = options
        if state is not None:
            _load_model(module, state[MODEL_FILE])
        self.accelerator.free_memory()  # of what was trained before a roll back
        self.backend = self._spread(module.to(self.device))
        distributed.limit_waits(self._timeout)
        self.average = None
        if options.ema_decay is not None:
            self.average = WeightAverage(self.backend, options.ema_decay)
        if state is not None:
            self.backend.load_optimizer_state(state[OPTIMIZER_FILE])
            if self.average is not None:
                self.average.load(state[AVERAGE_FILE])
        self.backend.wrapped.train()

    def _spread(self, module: Distillation) -> Backend:
        if self.zero:
            return self._zero(module)
        if self.shards:
            plugin = FullyShardedDataParallelPlugin()  # what Accelerate's config says
            if plugin.fsdp_version != 2:
                raise UsageError("Only FSDP version 2 is supported: set fsdp_version: 2.")
            fsdp.shard(
                module,
                module.model.blocks,
                compute=self.compute,
                reshard=bool(plugin.reshard_after_forward),
                offload=_asked("FSDP_OFFLOAD_PARAMS"),
            )
            return Sharded(module, self._adamw(module))
        optimizer = self._adamw(module)
        with warnings.catch_warnings():
            # Its successor, which older versions of torch lack, sends the buffers once more.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped = self.accelerator.prepare_model(module)
        return Replicated(module, optimizer, wrapped)

    def _zero(self, module: Distillation) -> Backend:
        from cmkd_scale.training.zero import Zero  # an optional package

        options = self.options
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        pieces = distributed.world_size() * options.parts
        config["train_micro_batch_size_per_gpu"] = options.global_batch_size // pieces
        config["gradient_accumulation_steps"] = options.parts
        config["train_batch_size"] = options.global_batch_size
        config["gradient_clipping"] = options.clip
        self.accelerator.gradient_accumulation_steps = options.parts
        wrapped, _ = self.accelerator.prepare(module, self._adamw(module))
        return Zero(module, wrapped)

    def _adamw(self, module: Distillation) -> torch.optim.AdamW:
        groups = parameter_groups(
            module,
            module.model,
            weight_decay=self.options.weight_decay,
            layer_decay=self.options.layer_decay,
        )
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def step(
        self,
        inputs: Tensor,
        labels: Tensor,
        step: int,
        beside: Mapping[str, Tensor] | None = None,
        *,
        learning_rate: float,
        at: Callable[[str, int], None] = lambda phase, step: None,
    ) -> Stepped:
        """Forward, backward and update of this process's share of a batch; a collective call.

        Args:
            inputs: [B, ...] of this process.
            labels: [B].
            step: number of the step.
            beside: what else the step reads, by name.
            learning_rate: of the schedule.
            at: told that the step has come to ``forward`` or ``backward``.
        """
        at("forward", step)
        begun = time.perf_counter()
        backend, count = self.backend, self.options.parts
        backend.set_learning_rate(learning_rate)
        results: list[StepResult] = []
        pieces = _pieces({**(beside or {}), _INPUTS: inputs, _LABELS: labels}, count, self.device)
        for number, others in enumerate(pieces, start=1):
            some, their_labels = others.pop(_INPUTS), others.pop(_LABELS)
            with (
                backend.part(last=number == count),
                self._adapted(some, their_labels, step, others),
            ):
                result: StepResult = backend.wrapped(some, their_labels, step, others)
                results.append(result.detached())
                if number == count:
                    own_seconds = time.perf_counter() - begun
                    at("backward", step)
                    underway = self.module.start_step(results)
                backend.backward(result.loss, count)
        norm = backend.update(self.options.clip)
        applied = bool(torch.isfinite(norm))
        if applied and self.average is not None:
            self.average.update(step)
        return Stepped(
            StepResult.mean(results), norm, applied, underway, learning_rate, own_seconds
        )

    def _adapted(
        self, inputs: Tensor, labels: Tensor, step: int, beside: Mapping[str, Tensor]
    ) -> AbstractContextManager[None]:
        """Around forward and backward, the inner steps of a bilevel method."""
        if self.bilevel is None:
            return nullcontext()
        return self.bilevel.adapted(inputs, labels, step, beside)

    def state(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        """What a checkpoint holds: file -> names and whole tensors.

        To be consumed in order, on all ranks: each item is a collective call. Tensors may be
        live, and are to be copied before the next step.
        """
        files = {MODEL_FILE: self._model_state(), OPTIMIZER_FILE: self.backend.optimizer_state()}
        if self.average is not None:
            files[AVERAGE_FILE] = self.average.state()
        return files

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights to be used from now on, whole and on the CPU of each rank; collective.

        Those of the average, if there is one.
        """
        weights = {name: value.cpu() for name, value in self._model_state()}
        if self.average is not None:
            weights.update({name: value.cpu() for name, value in self.average.state()})
        return weights

    def _model_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.nn.Parameter):
                value = self.backend.whole(value, self.backend.held(value))
            yield name, value.detach()


def _pieces(
    values: Mapping[str, Tensor], count: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Each of ``count`` equal parts of the rows of all values, on the device."""
    chunks = {name: value.chunk(count) for name, value in values.items()}
    for number in range(count):
        yield {name: parts[number].to(device) for name, parts in chunks.items()}


def _load_model(module: Distillation, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise IntegrityError(
            f"The checkpoint belongs to another model: {' '.join(str(error).split())}"
        ) from None


def _asked(variable: str) -> bool:
    """Whether Accelerate's launcher has set a switch."""
    found: Any = os.environ.get(variable, "false")
    return str(found).lower() in ("1", "true", "yes")
