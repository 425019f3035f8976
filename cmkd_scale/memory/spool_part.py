"""One file of the teacher's pass: what some batches have left, with a digest of its content."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmkd_scale.files import write_atomically
from cmkd_scale.memory.statistics import Moments

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassedBatch:
    """One batch behind the teacher."""

    number: int
    """Its place among all batches of the pass."""
    positions: Tensor
    """[n] int64 place of each sample in the pass: unique, and the order in which sums are taken."""
    labels: Tensor
    """[n] int64"""
    features: Tensor
    """[n, D] float32"""
    kept: Tensor
    """[n] bool: whether its features are kept, or only their sums."""
    missing: Tensor
    """[m] int64 positions of damaged samples, which are left out."""


_WHOLE = {"batches", "missing", "classes", "starts", "rest_classes", "rest_count", "few_classes"}
"""Small tensors of a part, which are read once; of the others, rows are read when needed."""
_FEW = 4
"""Sums of a class take as much space as so many samples: two 64-bit integers a feature."""


class Part:
    """A part on disk, or in memory if there is no path."""

    def __init__(self, path: Path | None, tensors: dict[str, Tensor] | None = None) -> None:
        self._path = path
        self._tensors = tensors or {}
        self._about: dict[str, str] = {}

    @staticmethod
    def write(path: Path, tensors: dict[str, Tensor], identity: str) -> Part:
        """Store a part; of its tensors, only the small ones are read again at once.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"identity": identity, "digest": _digest(tensors)}
        write_atomically(path, save(tensors, metadata={"cmkd": json.dumps(about)}))
        return Part(path, {name: tensors[name] for name in _WHOLE})

    def belongs_to(self, identity: str) -> bool:
        """Read its head; a part of another pass, or of none, is removed."""
        try:
            with safe_open(str(self._path), framework="pt") as file:
                self._about = json.loads((file.metadata() or {})["cmkd"])
                self._tensors = {name: file.get_tensor(name) for name in _WHOLE}
            if self._about["identity"] == identity:
                return True
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            pass
        self.drop("is damaged or belongs to another teacher, data or settings")
        return False

    def is_whole(self) -> bool:
        """Whether every byte is what was written."""
        try:
            with safe_open(str(self._path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in set(file.keys())}
        except (SafetensorError, OSError):
            return False
        return _digest(tensors) == self._about.get("digest")

    def get(self, name: str) -> Tensor:
        """One of the small tensors."""
        return self._tensors[name]

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor."""
        if name in self._tensors:
            return self._tensors[name][rows]
        with safe_open(str(self._path), framework="pt") as file:
            values: Tensor = file.get_slice(name)[rows]
        return values

    def drop(self, reason: str) -> None:
        """Remove it; its batches are passed again."""
        if self._path is not None:
            _log.warning("%s %s: left out", self._path, reason)
            self._path.unlink(missing_ok=True)


def part_tensors(batches: list[PassedBatch], dim: int) -> dict[str, Tensor]:
    """The content of a part: never more than the samples take.

    Of each class there are the features of the samples that are kept and the sums of the others,
    or the features of those, too, where they are too few for sums to be smaller.
    """
    positions, labels, features, kept = (
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("positions", "labels", "features", "kept")
    )
    order = _by_class(labels, kept)
    classes, counts = labels[order].unique_consecutive(return_counts=True)
    others = labels[~kept].bincount(minlength=int(labels.max()) + 1 if len(labels) else 0)
    few = _by_class(labels, ~kept & (others[labels] < _FEW))
    many = _by_class(labels, ~kept & (others[labels] >= _FEW))
    rest_classes, place = labels[many].unique(return_inverse=True)
    rest = Moments(len(rest_classes), dim)
    rest.update(features[many], place)
    return {
        "batches": torch.tensor([batch.number for batch in batches]),
        "missing": torch.cat([batch.missing for batch in batches]),
        "classes": classes,
        "starts": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        "positions": positions[order],
        "features": features[order],
        "rest_classes": rest_classes,
        "rest_count": rest.count,
        "rest_total": rest.total,
        "rest_squares": rest.squares,
        "few_classes": labels[few],
        "few_features": features[few],
    }


def _by_class(labels: Tensor, chosen: Tensor) -> Tensor:
    """Rows of the samples ``chosen`` [n], classes in order; as they came within a class."""
    rows = chosen.nonzero()[:, 0]
    return rows[torch.argsort(labels[rows], stable=True)]


def part_number(batches: Tensor) -> int:
    """60 bits that tell which batches a part holds, so the same work done twice is one part."""
    return int(_hash(batches).hexdigest()[:15], 16)


def _digest(tensors: dict[str, Tensor]) -> str:
    hashes = {name: _hash(values).hexdigest() for name, values in tensors.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _hash(values: Tensor) -> hashlib._Hash:
    return hashlib.sha256(values.contiguous().numpy().reshape(-1).view(np.uint8).data)
