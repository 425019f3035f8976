"""Features that another program has extracted, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from json import loads
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cmkd_scale.data.array import read_array
from cmkd_scale.data.modality_base import DecodeError, Modality, noise_like
from cmkd_scale.errors import UsageError

_MAX_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class FeaturesModality(Modality):
    """Vectors in ``.npy`` files, [dim] or one for each moment [T, dim]: [frames, dim] float32."""

    dim: int = 512
    """Numbers in a vector."""
    frames: int = 1
    """Parts of equal length that the moments are averaged over."""
    json: int = 0
    """1 reads the array of numbers in the ``.json`` member instead."""
    noise: float = 0.0
    """Standard deviation of augmenting noise, in units of the vector's own."""
    drop: float = 0.1
    """Augmenting probability of each number to become 0; the others grow by 1 / (1 - drop)."""

    extensions: ClassVar[tuple[str, ...]] = ("npy", "json")
    positive: ClassVar[frozenset[str]] = frozenset({"dim", "frames"})

    def __post_init__(self) -> None:
        """Refuse impossible options with ``UsageError``."""
        super().__post_init__()
        if self.drop >= 1:
            raise UsageError(f"FeaturesModality: drop is {self.drop}, not below 1.")

    @property
    def shape(self) -> tuple[int, ...]:
        """(frames, dim)."""
        return (self.frames, self.dim)

    def wants(self, extension: str) -> bool:
        """One of both: the ``.json`` beside an ``.npy`` says where it comes from."""
        return extension == ("json" if self.json else "npy")

    def decode(self, members: Mapping[str, bytes]) -> Tensor:
        """See ``Modality``."""
        extension = "json" if self.json else "npy"
        if extension not in members:
            raise DecodeError(f"it holds no {extension}.")
        content = members[extension]
        try:
            array = _read_json(content) if self.json else read_array(content, _MAX_ELEMENTS)
        except ValueError as error:
            raise DecodeError(f"it is {error}.") from None
        if not 1 <= array.ndim <= 2 or array.shape[-1] != self.dim or not array.size:
            raise DecodeError(
                f"it has shape {list(array.shape)}; vectors of data.transform.dim={self.dim} "
                "numbers are read."
            )
        if array.dtype == np.float32:
            moments = array.reshape(-1, self.dim).copy()  # what lies in a file is read-only
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # the result is looked at instead
                moments = array.astype(np.float32).reshape(-1, self.dim)
        if len(moments) != self.frames:
            pooled = F.adaptive_avg_pool1d(torch.from_numpy(moments).T, self.frames)
            moments = np.ascontiguousarray(pooled.T.numpy())
        if not np.isfinite(
            moments
        ).all():  # in numpy: of a few numbers torch takes 20 times as long
            raise DecodeError("it holds numbers that are not finite in float32.")
        return torch.from_numpy(moments)

    def augment(self, inputs: Tensor, rng: np.random.Generator) -> Tensor:
        """Add noise and leave out numbers."""
        kept = torch.from_numpy(rng.random(self.shape, dtype=np.float32) >= self.drop)
        if self.noise:
            inputs = inputs + noise_like(self.noise, inputs, rng) * inputs.std(unbiased=False)
        return inputs * kept / (1.0 - self.drop)


def _read_json(content: bytes) -> NDArray[np.generic]:
    """The array of numbers that a JSON text is; ValueError if it is something else."""
    try:
        array = np.array(loads(content))
    except (ValueError, RecursionError, OverflowError):
        array = np.array("")
    if array.dtype.kind not in "if":
        raise ValueError("a JSON text of something else than an array of numbers")
    return array
