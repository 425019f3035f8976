"""The prototype memory as an artifact: fields, save, load, digest, provenance, controls.

A memory is what remains of a frozen teacher after one pass over its modality: a few MB
with which a student is aligned to the teacher's class-conditional feature distribution
without the teacher and without its data. Stored as safetensors; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmkd_scale.errors import IntegrityError, UsageError
from cmkd_scale.files import write_atomically

FORMAT_VERSION = 1
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
    soft_labels: Tensor
    """[J, C] mean teacher probability of each prototype's samples at ``temperature``."""
    radius: Tensor
    """[J] mean distance of a prototype's samples to it."""
    class_mean: Tensor
    """[C, D] mean feature."""
    class_variance: Tensor
    """[C, D] variance of each feature."""
    class_count: Tensor
    """[C] int64 samples seen; 0 for a class the teacher's data lacks."""
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
            hasher.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()


def memory_bytes(memory: PrototypeMemory) -> bytes:
    """The content of a memory's file."""
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "class_names": json.dumps(memory.class_names),
        "temperature": json.dumps(memory.temperature),
        "digest": memory.digest(),
        "provenance": json.dumps(dict(memory.provenance), sort_keys=True),
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in memory.tensors().items()}
    return save(tensors, metadata=metadata)


def save_memory(memory: PrototypeMemory, path: Path) -> str:
    """Write a memory atomically and return its digest.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, memory_bytes(memory))
    except OSError as error:
        raise UsageError(
            f"The memory {path} cannot be written: {error}. Free space or choose another run.dir."
        ) from None
    return memory.digest()


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


def permuted_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control "is it the teacher's knowledge?": every class takes another's name.

    The permutation is one random cycle, so no class keeps its own statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(memory.class_names), generator=generator).tolist()
    names = list(memory.class_names)
    for place, following in zip(order, order[1:] + order[:1], strict=True):
        names[place] = memory.class_names[following]
    return replace(memory, class_names=tuple(names))


def random_teacher(memory: PrototypeMemory, seed: int) -> PrototypeMemory:
    """The null control of an untrained teacher: random class centres and a random head.

    Scales are kept (spread of the class means, offsets within a class, norm of the head),
    so that only the knowledge is gone. Soft labels are what that head says of its
    prototypes.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = memory.class_mean.mean(0)
    spread = memory.class_mean.std(0, correction=0).clamp(min=1e-6)
    noise = torch.randn(memory.class_mean.shape, generator=generator)
    class_mean = centre + noise * spread
    moved = class_mean - memory.class_mean
    prototypes = memory.prototypes + moved[memory.prototype_class]
    weight = torch.randn(memory.head_weight.shape, generator=generator)
    weight = weight * (memory.head_weight.norm() / weight.norm())
    logits = prototypes @ weight.T + memory.head_bias
    return replace(
        memory,
        prototypes=prototypes,
        class_mean=class_mean,
        head_weight=weight,
        soft_labels=torch.softmax(logits / memory.temperature, dim=1),
    )


def apply_control(memory: PrototypeMemory, control: str, seed: int) -> PrototypeMemory:
    """The memory itself (``none``) or its null control (``permuted``, ``random``)."""
    if control == "permuted":
        return permuted_teacher(memory, seed)
    if control == "random":
        return random_teacher(memory, seed)
    return memory


def align_to_student(memory: PrototypeMemory, student_names: Sequence[str]) -> PrototypeMemory:
    """Bring a memory into a student's classes and their order; names are all that joins them.

    Classes that only the teacher knows are dropped and soft labels renormalised over the
    rest. Classes that only the student knows, or that the teacher's data lacked, keep a count
    of 0, no prototypes, and a head row of zeros.

    Raises:
        UsageError: the two have no class name in common.
    """
    # A class that the teacher's data lacked has a name but no knowledge.
    source = {
        name: index
        for index, name in enumerate(memory.class_names)
        if memory.class_count[index] > 0
    }
    origin = torch.tensor([source.get(name, -1) for name in student_names])
    known = origin >= 0
    if not known.any():
        raise UsageError(
            "The memory and the student's shards have no class name in common (memory: "
            f"{_examples(memory.class_names)}; student: {_examples(student_names)}). Modalities "
            "are joined by label names alone: rebuild one of them with the other's names."
        )
    target = torch.full((len(memory.class_names),), -1)
    target[origin[known]] = torch.arange(len(student_names))[known]
    new_class = target[memory.prototype_class]
    # Prototypes in the order of the student's classes: equal names give equal bytes.
    kept = torch.argsort(new_class, stable=True)
    kept = kept[new_class[kept] >= 0]
    soft = _columns(memory.soft_labels[kept], origin, fill=0.0)
    if (target < 0).any():
        soft = soft / soft.sum(1, keepdim=True).clamp(min=1e-12)
    return replace(
        memory,
        class_names=tuple(student_names),
        prototypes=memory.prototypes[kept],
        prototype_class=new_class[kept],
        prototype_mass=memory.prototype_mass[kept],
        radius=memory.radius[kept],
        soft_labels=soft,
        class_mean=_rows(memory.class_mean, origin, fill=0.0),
        class_variance=_rows(memory.class_variance, origin, fill=0.0),
        class_count=_rows(memory.class_count, origin, fill=0),
        class_risk=_rows(memory.class_risk, origin, fill=float("nan")),
        head_weight=_rows(memory.head_weight, origin, fill=0.0),
        head_bias=_rows(memory.head_bias, origin, fill=0.0),
    )


def _rows(values: Tensor, origin: Tensor, fill: float) -> Tensor:
    taken = values[origin.clamp(min=0)].clone()
    taken[origin < 0] = fill
    return taken


def _columns(values: Tensor, origin: Tensor, fill: float) -> Tensor:
    return _rows(values.T, origin, fill).T.contiguous()


def _examples(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, ... ({len(names)} classes)" if len(names) > 3 else shown
