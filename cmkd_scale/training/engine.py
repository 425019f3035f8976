"""The door to Accelerate: device, processes, backward, clipping, consolidated state.

The only importer of ``accelerate``. The same code runs alone, under ``accelerate launch``
and under torchrun; a launch whose world is not what it seems is refused at once.
"""

from __future__ import annotations

import logging
import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from cmkd_scale import distributed
from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.training.distillation import Distillation, StepResult, Underway

_EXEMPT_DIMENSIONS = 1


class Engine:
    """One training module on this process's device, in step with all others."""

    def __init__(self, *, mixed_precision: str, world_size: int | None) -> None:
        """Join the launched world.

        Args:
            mixed_precision: ``no`` or ``bf16``.
            world_size: number of processes that the config demands, or None.

        Raises:
            UsageError: the launch is not what it seems (``check_world``).
        """
        if not torch.cuda.is_available():
            # Without it, several CPU processes would each train alone (see check_world).
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            kwargs_handlers=[
                # Every buffer is equal on all ranks by construction.
                DistributedDataParallelKwargs(broadcast_buffers=False)
            ],
        )
        distributed.check_world(self.accelerator.num_processes, world_size)
        # Accelerate asks for rank numbers in every record; one voice is enough.
        logging.getLogger("accelerate").setLevel(logging.WARNING)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    def check_batch_size(self, global_batch_size: int) -> None:
        """Refuse a batch that ranks cannot share.

        Raises:
            UsageError: the batch cannot be divided evenly.
        """
        world = distributed.world_size()
        if global_batch_size % world:
            lower = global_batch_size - global_batch_size % world
            choices = [size for size in (lower, lower + world) if size > 0]
            raise UsageError(
                f"train.global_batch_size {global_batch_size} cannot be divided over {world} "
                f"processes; use {' or '.join(map(str, choices))}, or another number of processes."
            )

    def prepare(self, module: Distillation, *, learning_rate: float, weight_decay: float) -> None:
        """Take a module for training with AdamW (Loshchilov and Hutter 2019)."""
        self.module = module
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(module, weight_decay), lr=learning_rate, betas=(0.9, 0.98)
        )
        self.wrapped, self.prepared_optimizer = self.accelerator.prepare(module, self.optimizer)
        self.wrapped.train()

    def step(
        self, inputs: Tensor, labels: Tensor, step: int, *, learning_rate: float, clip: float
    ) -> tuple[StepResult, Tensor, Underway]:
        """Forward, backward and update.

        Returns:
            The step's result, the gradient's norm [], and the exchange between ranks that ran
            beside backward, for ``Distillation.finish_step``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        result: StepResult = self.wrapped(inputs.to(self.device), labels.to(self.device), step)
        underway = self.module.start_step(result)
        self.accelerator.backward(result.loss)
        norm = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), clip)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        return result, norm, underway

    def model_state(self) -> dict[str, Tensor]:
        """Consolidated parameters and buffers on the CPU, by name."""
        return {name: value.detach().cpu() for name, value in self.module.state_dict().items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Consolidated optimizer state on the CPU: ``PARAMETER/MOMENT`` -> tensor."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {
            f"{names[id(parameter)]}/{key}": value.detach().cpu()
            for parameter, moments in self.optimizer.state.items()
            for key, value in moments.items()
        }

    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Take up the states of a checkpoint.

        Raises:
            IntegrityError: they belong to a model of another shape.
        """
        try:
            self.module.load_state_dict(model)
        except RuntimeError as error:
            raise IntegrityError(
                f"The checkpoint belongs to another model: {' '.join(str(error).split())}"
            ) from None
        parameters = dict(self.module.named_parameters())
        for key, value in optimizer.items():
            name, _, moment = key.rpartition("/")
            if name not in parameters:
                raise IntegrityError(f"The checkpoint's optimizer has no parameter {name} here.")
            parameter = parameters[name]
            # AdamW keeps its step counter on the CPU.
            device = value.device if moment == "step" else parameter.device
            self.optimizer.state[parameter][moment] = value.clone().to(device)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases, norms and other vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in trained if p.ndim > _EXEMPT_DIMENSIONS],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if p.ndim <= _EXEMPT_DIMENSIONS], "weight_decay": 0.0},
    ]
