"""The prototype memory as an artifact: fields, save, load, digest, provenance.

A memory is what remains of a frozen teacher after one pass over its modality: a few MB
with which a student is aligned to the teacher's class-conditional feature distribution
without the teacher and without its data. Stored as safetensors; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import sync
from cmkd_scale.memory.kmeans import prototype_count

FORMAT_VERSION = 2
FILE_NAME = "memory.safetensors"


@dataclass(frozen=True)
class PrototypeMemory:
    """Class-conditional feature distribution and head of a teacher; shapes as in ``records``."""

    class_names: tuple[str, ...]
    prototypes: Tensor
    """[J, D] k-means centres, classes in order."""
    prototype_class: Tensor
    """[J] int64 class of each prototype."""
    prototype_mass: Tensor
    """[J] share of its class's samples; sums to 1 within a class."""
    soft_label_values: Tensor
    """[J, k] mean teacher probability at ``temperature`` of the prototype's samples, of its k
    likeliest classes (of all, in their order, when k is C); see ``soft_labels``."""
    soft_label_classes: Tensor
    """[J, k] int32 those classes."""
    soft_label_rest: Tensor
    """[J] probability of every class that is not among them."""
    radius: Tensor
    """[J] mean distance of a prototype's samples to it."""
    class_mean: Tensor
    """[C, D] mean feature."""
    class_variance: Tensor
    """[C, D] variance of each feature."""
    class_factor: Tensor
    """[C, R, D] leading directions F of the covariance, each as long as the standard deviation
    along it: covariance = F^T F + what ``class_variance`` leaves on the diagonal, 0 or more."""
    class_count: Tensor
    """[C] int64 samples seen; 0 for a class the teacher's data lacks."""
    class_kept: Tensor
    """[C] int64 of them, those that were clustered: a class is known, and has prototypes, if
    there is one."""
    class_risk: Tensor
    """[C] cross-entropy in nats of the teacher on held-out samples; NaN where there are none."""
    head_weight: Tensor
    """[C, D] the teacher's head."""
    head_bias: Tensor
    """[C]"""
    cost_scale: Tensor
    """[] median over samples of the mean distance to their class's prototypes: unit of cost."""
    temperature: float = 4.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from; not part of the digest."""

    @property
    def feature_dim(self) -> int:
        """Width D of the feature space."""
        return self.prototypes.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def digest(self) -> str:
        """SHA-256 of class names, temperature and the bytes of every tensor."""
        hasher = hashlib.sha256()
        header = {
            "version": FORMAT_VERSION,
            "class_names": self.class_names,
            "temperature": self.temperature,
        }
        hasher.update(json.dumps(header).encode())
        for name, tensor in sorted(self.tensors().items()):
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            # Bytes as they lie: a copy of the largest table would be a gigabyte.
            hasher.update(
                tensor.detach().cpu().contiguous().numpy().reshape(-1).view(np.uint8).data
            )
        return hasher.hexdigest()


def thin_classes(memory: PrototypeMemory) -> dict[str, dict[str, Any]]:
    """Classes of which there is little to know: how many, and the names of the first ten.

    A class with one sample has one prototype, a radius of 0 and no covariance. A class has fewer
    prototypes than were asked for (``prototypes_per_class`` in the provenance; without it, the
    rule of ``prototype_count``) if its samples are equal, or fewer than two a prototype.
    """
    kept, wanted = memory.class_kept, memory.provenance.get("prototypes_per_class")
    found = memory.prototype_class.bincount(minlength=len(kept))
    asked = [wanted or prototype_count(samples, None) for samples in kept.tolist()]
    chosen = {
        "without_samples": kept == 0,
        "with_one_sample": kept == 1,
        "with_fewer_prototypes": (kept > 0) & (found < torch.tensor(asked)),
    }
    return {
        name: {
            "count": int(flags.sum()),
            "first": [memory.class_names[label] for label in flags.nonzero()[:10, 0]],
        }
        for name, flags in chosen.items()
    }


def memory_bytes(memory: PrototypeMemory) -> bytes:
    """The content of a memory's file."""
    tensors, metadata = _content(memory)
    return save(tensors, metadata=metadata)


def _content(memory: PrototypeMemory) -> tuple[dict[str, Tensor], dict[str, str]]:
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "class_names": json.dumps(memory.class_names),
        "temperature": json.dumps(memory.temperature),
        "digest": memory.digest(),
        "provenance": json.dumps(dict(memory.provenance), sort_keys=True),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in memory.tensors().items()}
    return tensors, metadata


def save_memory(memory: PrototypeMemory, path: Path) -> str:
    """Write a memory atomically and return its digest.

    Raises:
        UsageError: the file cannot be written.
    """
    tensors, metadata = _content(memory)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Straight from the tensors: their bytes in memory once more may be gigabytes.
        save_file(tensors, temporary, metadata=metadata)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(
            f"The memory {path} cannot be written: {error}. Free space or choose another run.dir."
        ) from None
    return metadata["digest"]


def load_memory(path: Path) -> PrototypeMemory:
    """Read a memory from its file or its run directory and check its digest.

    Raises:
        UsageError: there is no memory at ``path``.
        IntegrityError: the file is not a memory, is damaged, or has another digest.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"There is no prototype memory at {path}. Build one with `cmkd memory --config FILE "
            "teacher.run=TEACHER run.dir=DIR` and set memory.run=DIR."
        )
    try:
        with safe_open(str(file), framework="pt") as archive:
            metadata = archive.metadata() or {}
            names = {f.name for f in fields(PrototypeMemory)}
            tensors = {key: archive.get_tensor(key) for key in names & set(archive.keys())}
        version = int(metadata["format_version"])
        if version != FORMAT_VERSION:
            raise IntegrityError(
                f"{file} has format {version}, and this version of the program reads "
                f"{FORMAT_VERSION}. Build it again with `cmkd memory`."
            )
        memory = PrototypeMemory(
            class_names=tuple(json.loads(metadata["class_names"])),
            temperature=float(json.loads(metadata["temperature"])),
            provenance=json.loads(metadata["provenance"]),
            **tensors,
        )
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise IntegrityError(
            f"{file} is not a prototype memory or is damaged ({error}). Build it again with "
            "`cmkd memory`."
        ) from None
    if memory.digest() != metadata.get("digest"):
        raise IntegrityError(
            f"{file} does not match its own digest; it was changed or damaged after it was "
            "written. Copy it again from its origin or build it again with `cmkd memory`."
        )
    return memory
