"""What a pass is of: what its parts, and the memory made from it, are recognised by."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.stages.common import Trained, weights_digest
from cmkd_scale.stages.runs import versions
from cmkd_scale.stages.streams import SplitData


def pass_identity(trained: Trained, data: SplitData, config: Config) -> str:
    """SHA-256 of teacher, data and the settings of the pass; the order of shards has no part."""
    about = {
        "teacher": weights_digest(trained.model),
        "transform": trained.spec.transform,
        "data": _samples(data),
        "label_names": data.label_names,
        "batch_size": config.memory.batch_size,
        "max_samples_per_class": config.memory.max_samples_per_class,
    }
    return _digest(about)


def memory_identity(
    identity: str, held_out: SplitData, config: Config, previous: str | None
) -> str:
    """SHA-256 of all that decides about a memory.

    Args:
        identity: of the pass.
        held_out: what the teacher was not trained on.
        config: of the run.
        previous: digest of ``memory.previous``, if it is given.
    """
    about = {
        "pass": identity,
        "held_out": _samples(held_out),
        "temperature": config.memory.temperature,
        "prototypes_per_class": config.memory.prototypes_per_class,
        "covariance_rank": config.memory.covariance_rank,
        "seed": config.run.seed,
        "previous": previous,
    }
    return _digest(about)


def parts_identity(identity: str, device: torch.device) -> str:
    """SHA-256 that parts of one pass have in common; a collective call, alike on all ranks.

    Other processors and other versions may round otherwise, so parts of one kind of machine do
    not serve on another. Which kinds there are counts, not how many of each.
    """
    found = {name: versions()[name] for name in ("cmkd_scale", "torch")}
    mine = _digest({**found, "device": device.type, "processor": processor(device)})
    kinds = sorted(set(distributed.gather_integers(int(mine[:15], 16))))
    return _digest({"pass": identity, "machines": kinds})


def processor(device: torch.device) -> str:
    """Name of the model of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _samples(data: SplitData) -> dict[str, Any]:
    shards = data.reader.manifest.shards
    return {
        "shards": sorted(shard.sha256 for shard in shards),
        "label_index": data.reader.label_index,
    }


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=list).encode()).hexdigest()
