"""Memory of each rank under every backend, from a model's sizes: which fits, and which to take.

Parameters, gradients and AdamW's two moments are float32 under all backends (``training/engine``).
How ZeRO cuts them up: Rajbhandari et al. 2020; FSDP2: Zhao et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FLOAT = 4
"""Bytes of a float32."""

BACKENDS = ("ddp", "zero1", "zero2", "fsdp2", "zero3", "zero3_offload")
"""From the one that sends least to the one that keeps least on the device."""

MARGIN = 0.9
"""Share of a device's memory that a plan may take; the rest is for kernels and fragments."""

_ZERO_BUCKET = 500_000_000
"""Numbers in DeepSpeed's bucket of gradients (``reduce_bucket_size``), at most."""
_ZERO3_LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered (``stage3_max_live_parameters``), at most."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a run takes up memory."""

    parameters: int
    """Numbers that are trained."""
    root_parameters: int
    """Of them in no block of the encoder: head, projection, projectors."""
    largest_block: int
    """Numbers in the largest block of the encoder."""
    frozen_bytes: int
    """Prototype memory as it is laid out, and the weights of a live teacher."""
    activation_bytes: int
    """Peak of a forward and backward pass without gradients of parameters."""
    evaluation_bytes: int
    """What evaluation adds after training: the model once more, and a forward pass."""
    averaged: bool
    """Whether an average of the weights is kept (``train.ema_decay``)."""
    blob_bytes: int
    """Memory files that each checkpoint holds."""
    gather_bytes: int
    """Of a number in which FSDP2 gathers weights: 2 with bfloat16."""
    runtime_bytes: int
    """Of a process before there is any model: interpreter, libraries."""
    context_bytes: int
    """On a GPU before there is any model."""
    cached_bytes: int
    """Decoded samples that a rank's processes keep."""
    kept_bytes: int = 0
    """Weights of the model that are not trained, as of a frozen backbone."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of a checkpoint: weights, two moments, the average, the memories."""
        trained = (3 + self.averaged) * FLOAT * self.parameters
        return trained + self.kept_bytes + self.blob_bytes


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    device: Mapping[str, int]
    """By purpose, where it computes."""
    host: Mapping[str, int]
    """By purpose, in the memory of its machine; that of rank 0, which writes checkpoints."""

    @property
    def device_bytes(self) -> int:
        """Where it computes."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """In the memory of its machine."""
        return sum(self.host.values())

    @property
    def bytes(self) -> int:
        """Of both: what a rank takes where the device is the CPU."""
        return self.device_bytes + self.host_bytes


def rank_memory(sizes: Sizes, backend: str, world_size: int) -> RankMemory:
    """What one rank holds at its peak.

    Args:
        sizes: of the run.
        backend: ``single`` or one of ``BACKENDS``.
        world_size: number of ranks.
    """
    whole = FLOAT * sizes.parameters
    part = -(-whole // world_size)
    held = {
        "single": (whole, whole, whole),
        "ddp": (whole, whole, whole),
        "zero1": (whole, whole, part),
        "zero2": (whole, part, part),
        "fsdp2": (part, part, part),
        "zero3": (part, part, part),
        "zero3_offload": (part, part, part),
    }[backend]
    parameters, gradients, moments = held[0], held[1], 2 * held[2]
    device: dict[str, int] = {
        "parameters": parameters,
        "gradients": gradients,
        "moments": moments,
        "activations or evaluation": max(sizes.activation_bytes, sizes.evaluation_bytes),
        "memory and teacher": sizes.frozen_bytes,
        # FSDP2 and stage 3 cut them up, too, and have a block of them whole: taken as whole here.
        "frozen backbone": sizes.kept_bytes,
        "average": parameters if sizes.averaged else 0,
        "context": sizes.context_bytes,
    }
    if backend == "fsdp2":
        device["gathered"] = _gathered(sizes)
    elif backend.startswith("zero"):
        device["master copy"] = part  # DeepSpeed's own, beside parameters that are float32
        bucket = FLOAT * min(_ZERO_BUCKET, sizes.parameters)
        device["buckets"] = bucket if backend == "zero1" else 2 * bucket
        if backend.startswith("zero3"):
            device["gathered"] = FLOAT * min(_ZERO3_LIVE, sizes.parameters)
    host = {
        "runtime": sizes.runtime_bytes,
        "cached samples": sizes.cached_bytes,
        "checkpoint": sizes.checkpoint_bytes,
    }
    if sizes.context_bytes or held[0] < whole:
        host["whole weights"] = whole  # what is evaluated, where it is not what was trained
    if backend == "zero3_offload":
        for name in ("parameters", "moments", "master copy"):
            host[name] = device.pop(name)
    return RankMemory(_filled(device), _filled(host))


def _gathered(sizes: Sizes) -> int:
    """What FSDP2 has whole at once: what is in no block, one block at work and the next.

    Beside the weights, the gradients of the block at work, and their copy that is reduced.
    """
    weights = sizes.gather_bytes * (sizes.root_parameters + 2 * sizes.largest_block)
    gradients = (sizes.gather_bytes + FLOAT) * max(sizes.largest_block, sizes.root_parameters)
    return weights + gradients


def _filled(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


def advise(sizes: Sizes, world_size: int, available_bytes: int, *, shared: bool) -> str | None:
    """The first of ``BACKENDS`` that fits, ``single`` on one rank; None if none does.

    Args:
        sizes: of the run.
        world_size: number of ranks.
        available_bytes: of a rank's device.
        shared: whether that is the machine's memory, which holds the host's part as well.
    """
    for backend in ("single",) if world_size == 1 else BACKENDS:
        memory = rank_memory(sizes, backend, world_size)
        if (memory.bytes if shared else memory.device_bytes) <= MARGIN * available_bytes:
            return backend
    return None
