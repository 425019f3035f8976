"""What a pass is of: what its parts, and the memory made from it, are recognised by."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from cmkd_scale import distributed
from cmkd_scale.config import Config
from cmkd_scale.data.manifest import Manifest
from cmkd_scale.stages.common import Trained, weights_digest
from cmkd_scale.stages.runs import versions
from cmkd_scale.stages.streams import SplitData, make_modality


def pass_identity(trained: Trained, data: SplitData, config: Config) -> str:
    """SHA-256 of teacher, data and the settings of the pass; the order of shards has no part."""
    about = {
        "teacher": weights_digest(trained.model),
        "transform": transform_identity(trained),
        "data": _samples(data),
        "label_names": data.label_names,
        "batch_size": config.memory.batch_size,
        "mixed_precision": config.memory.mixed_precision,
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


def transform_identity(trained: Trained) -> dict[str, JsonValue]:
    """All that shapes what a teacher sees of a sample, as JSON gives it back."""
    spec = trained.spec
    modality = make_modality(spec.modality, spec.transform, trained.processor)
    values: dict[str, JsonValue] = json.loads(json.dumps(modality.identity()))
    return values


def fingerprint(
    trained: Trained, manifest: Manifest, label_index: Sequence[int]
) -> dict[str, JsonValue]:
    """What a teacher's outputs are of, part by part, so that one that differs can be named.

    Args:
        trained: the teacher.
        manifest: of the split; the order of its shards has no part.
        label_index: [C] the teacher's class of each label that is stored.
    """
    return {
        "teacher": weights_digest(trained.model),
        "transform": transform_identity(trained),
        "data": _digest({"shards": sorted(shard.sha256 for shard in manifest.shards)}),
        "labels": _digest({"index": label_index, "names": trained.spec.label_names}),
    }


def machine_kinds(device: torch.device) -> list[int]:
    """The kinds of machines that the ranks compute on, ascending; a collective call.

    Other processors and other versions may round otherwise. Which kinds there are counts, not how
    many of each.
    """
    found = {name: versions()[name] for name in ("cmkd_scale", "torch")}
    mine = _digest({**found, "device": device.type, "processor": processor(device)})
    return sorted(set(distributed.gather_integers(int(mine[:15], 16))))


def parts_identity(identity: str, machines: list[int]) -> str:
    """SHA-256 that parts of one pass have in common: those of one kind of machine do not serve
    on another."""
    return _digest({"pass": identity, "machines": machines})


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
